"""Write the state of a run after each round to one file that is always whole, and read it.

In:  the global values, the server optimiser's vectors, the round, how long `rounds.jsonl` is, and
     which part of the file of the clients' records is valid (fedpet/run/client_journal.py).
Out: RUN/journal, from which a run goes on as if nothing had happened: same seed, same bytes.

    journal := magic "FPJL" | version u8 | 3 reserved | SHA-256 of the rest (32)
               | header bytes u32 | header (JSON) | arrays (safetensors)    (little-endian)

It is written beside its place, brought to the disk, and moved there: a crash at any moment leaves
the old one or the new one. Nothing in it is ever executed. Seeds need no place in it: each is
derived from the run's own seed and the round.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedpet.errors import ConfigError, RunError
from fedpet.protocol.ledger import TRAINING
from fedpet.run.client_journal import Written, remove_client_journals
from fedpet.run.client_quality import KeptRound
from fedpet.utils.atomic_write import atomic_write

__all__ = ["RunCheckpoint", "read_journal", "remove_journal", "write_journal", "writing_journal"]

NAME = "journal"
VALUES, KEPT = "values", "kept"

_MAGIC = b"FPJL"
_VERSION = 2
_START = struct.Struct("<4sB3x32s")
_LENGTH = struct.Struct("<I")
_OPTIMISER = "optimiser."


@dataclass(frozen=True, kw_only=True)
class RunCheckpoint:
    """The state of a run between two rounds.

    Attributes:
        server_round: The last round that is over; 0 after the evaluation before the first.
        plan_digest: Of the plan, hex.
        clients: SHA-256 (hex) over the clients' names and their numbers of rows.
        settings: The tables of the experiment that decide the outcome.
        ledger_bytes: Length of `rounds.jsonl` when this was written.
        holders: Nodes known to hold the plan.
        clients_file: The records of clients.
        elapsed_seconds: Since the run's start, pauses left out.
        resumed: How often the run has been gone on with.
        kind: Of the rounds: "training", or "search" before them.
        values: Global values, float32, (num_values,).
        optimiser: The server optimiser's vectors by Flower's names; what the wire remembers, by
            names that begin with "wire/".
        kept: The best round so far, where its model is the run's.
    """

    server_round: int
    plan_digest: str
    clients: str
    settings: Mapping[str, Any]
    ledger_bytes: int
    holders: tuple[int, ...]
    clients_file: Written
    elapsed_seconds: float
    resumed: int
    values: np.ndarray
    optimiser: Mapping[str, np.ndarray] = field(default_factory=dict)
    kind: str = TRAINING
    kept: KeptRound | None = None

    def to_bytes(self) -> bytes:
        """Serialise."""
        fields = asdict(replace(self, kept=None))
        del fields["kept"]
        arrays = {VALUES: fields.pop(VALUES)}
        if self.kept is not None:
            fields["kept"] = [self.kept.server_round, self.kept.metric]
            arrays[KEPT] = self.kept.values
        arrays |= {_OPTIMISER + name: v for name, v in fields.pop("optimiser").items()}
        header = json.dumps(fields, sort_keys=True).encode()
        rest = _LENGTH.pack(len(header)) + header + save(arrays)
        return _START.pack(_MAGIC, _VERSION, hashlib.sha256(rest).digest()) + rest

    @classmethod
    def from_bytes(cls, data: bytes) -> RunCheckpoint:
        """Parse what `to_bytes` wrote.

        Raises:
            ConfigError: The bytes are no journal of this version, or were damaged.
        """
        least = _START.size + _LENGTH.size
        if len(data) < least:
            raise ConfigError(f"a journal has at least {least} bytes, got {len(data)}.")
        magic, version, digest = _START.unpack_from(data)
        if magic != _MAGIC or version != _VERSION:
            raise ConfigError(
                f"a journal starts with {_MAGIC!r} and version {_VERSION}, got {magic!r} and "
                f"{version}: resume with the fedpet that wrote it."
            )
        if hashlib.sha256(data[_START.size :]).digest() != digest:
            raise ConfigError("the journal's checksum is wrong: it was damaged on the disk.")
        stop = least + _LENGTH.unpack_from(data, _START.size)[0]
        try:
            fields = json.loads(data[least:stop])
            arrays = load(data[stop:])
            fields["holders"] = tuple(fields["holders"])
            fields["clients_file"] = Written(*fields["clients_file"])
            values = arrays.pop(VALUES)
            if "kept" in fields:
                number, metric = fields["kept"]
                fields["kept"] = KeptRound(number, metric, arrays.pop(KEPT))
            optimiser = {name.removeprefix(_OPTIMISER): vector for name, vector in arrays.items()}
            return cls(values=values, optimiser=optimiser, **fields)
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ConfigError(f"the journal does not read: {error!r}.") from None


def write_journal(folder: Path, journal: RunCheckpoint) -> None:
    """Put a journal in its place, whole, and on the disk.

    Raises:
        RunError: The disk does not take it. The one before stays.
    """
    with writing_journal(folder, journal.server_round):
        atomic_write(folder / NAME, journal.to_bytes(), durable=True)


@contextmanager
def writing_journal(folder: Path, server_round: int) -> Iterator[None]:
    """Say what to do where the disk takes no journal, by a RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"the journal of round {server_round} cannot be written: {error}. Make room; the run "
            f"goes on from an earlier round with `fedpet simulate --resume {folder}`."
        ) from None


def read_journal(folder: Path) -> RunCheckpoint | None:
    """Read the journal of a run's folder; None where there is none yet.

    Raises:
        ConfigError: It is no journal, of another version, or damaged.
    """
    path = folder / NAME
    try:
        return RunCheckpoint.from_bytes(path.read_bytes())
    except FileNotFoundError:
        return None
    except ConfigError as error:
        raise ConfigError(f"{str(path)!r}: {error}") from None


def remove_journal(folder: Path) -> None:
    """Take away the journal of a run that has its result."""
    (folder / NAME).unlink(missing_ok=True)
    remove_client_journals(folder)
