"""What a node keeps of a run from one message to the next: references, and clients' residuals.

    ... -> codec -> plan -> [client] -> strategy -> ledger -> report

In:  vectors, by tier (references) or by client and round (residuals).
Out: the same, in this process or another, or nothing where a file is absent or damaged.

    CACHE/state/PLAN DIGEST/RUN/reference-TIER        the last reference, see
    fedpet/protocol/shared_reference.py
                               /CLIENT.0, CLIENT.1    residuals of the client's last two rounds

The server names the run in every message, by a number drawn when it began and kept in its journal:
another run of the same plan finds nothing of this one, a run that goes on after a crash finds all.

A residual is what a lossy codec left of an update (fedpet/codec/error_feedback.py). A client
learns only
at its next request whether its last payload was taken, so it keeps two: the residual of the round
that the server last accepted, and that of the round after. The files are shared by all processes
of a machine, since a client may be trained by another worker in its next round; a round has one
worker for each client, and files come whole or not at all.

    file := magic "FPKV" | version u8 | 3 reserved | round u32 | count u32 | CRC-32 u32 of all
            before and the values | values, float32, little-endian
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np

from fedpet.protocol.shared_reference import Reference
from fedpet.utils.atomic_write import atomic_write, untouched

__all__ = ["NodeState", "state_folder"]

_HEAD = struct.Struct("<4sB3xII")
_CHECKSUM = struct.Struct("<I")
_MAGIC, _VERSION = b"FPKV", 1
_KEPT_SECONDS = 7 * 24 * 3600.0  # of a run that no message came of


def state_folder(cache: Path, digest: bytes, run: int) -> Path:
    """Where a node keeps what it must remember of a run."""
    return cache / "state" / digest.hex() / f"{run:016x}"


class NodeState:
    """What is kept of one run.

    Args:
        folder: Of `state_folder`; made, and folders of runs that ended long ago are removed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._references: dict[int, Reference] = {}
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
        _forget_old(folder.parent.parent)

    # -- references -------------------------------------------------------------------------

    def reference_in_memory(self, tier: int) -> Reference | None:
        """The last that this process followed."""
        return self._references.get(tier)

    def reference_on_disk(self, tier: int, count: int) -> Reference | None:
        """The last that any process of this machine followed."""
        found = _read(self.folder / f"reference-{tier}", count)
        return None if found is None else Reference(*found)

    def keep_reference(self, tier: int, reference: Reference) -> None:
        """Take the place of the one before."""
        before = self._references.get(tier)
        self._references[tier] = reference
        if before is None or before.server_round != reference.server_round:
            _write(self.folder / f"reference-{tier}", reference.server_round, reference.values)

    # -- residuals --------------------------------------------------------------------------

    def residual(self, client: int, server_round: int, count: int) -> np.ndarray | None:
        """What a client's payload of that round left; None where it is not held.

        Args:
            client: Its number.
            server_round: The last round of which the server took its payload.
            count: How many values it must have.

        Returns:
            float32, (count,).
        """
        for path in self._slots(client):
            found = _read(path, count)
            if found is not None and found[0] == server_round:
                return found[1]
        return None

    def keep_residual(
        self, client: int, server_round: int, residual: np.ndarray, *, accepted: int
    ) -> None:
        """Keep a round's residual beside that of the last accepted round."""
        first, second = self._slots(client)
        taken = accepted > 0 and _round_of(first) == accepted
        _write(second if taken else first, server_round, residual)

    def _slots(self, client: int) -> tuple[Path, Path]:
        return self.folder / f"{client:016x}.0", self.folder / f"{client:016x}.1"


def _write(path: Path, server_round: int, values: np.ndarray) -> None:
    head = _HEAD.pack(_MAGIC, _VERSION, server_round, len(values))
    data = values.astype("<f4", copy=False).tobytes()
    checksum = _CHECKSUM.pack(zlib.crc32(data, zlib.crc32(head)))
    # Where the folder is gone the run is over: a straggler has nothing to keep for it.
    with contextlib.suppress(FileNotFoundError):
        atomic_write(path, head + checksum + data, shared=True)


def _read(path: Path, count: int) -> tuple[int, np.ndarray] | None:
    """Round and values of a file; None where it is not what `_write` wrote for so many values."""
    whole = _HEAD.size + _CHECKSUM.size + 4 * count
    try:
        with path.open("rb") as file:
            content = file.read(whole + 1)  # no more than is due, whatever lies there
    except OSError:
        return None
    if len(content) != whole:
        return None
    magic, version, server_round, written = _HEAD.unpack_from(content)
    (checksum,) = _CHECKSUM.unpack_from(content, _HEAD.size)
    data = content[_HEAD.size + _CHECKSUM.size :]
    if (magic, version, written) != (_MAGIC, _VERSION, count):
        return None
    if zlib.crc32(data, zlib.crc32(content[: _HEAD.size])) != checksum:
        return None
    values = np.frombuffer(data, dtype="<f4").astype(np.float32)  # a copy, that may be written to
    return (server_round, values) if np.isfinite(values).all() else None


def _round_of(path: Path) -> int:
    """The round that a file says it is of; 0 where it says none."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD.size)
    except OSError:
        return 0
    return int(_HEAD.unpack(head)[2]) if len(head) == _HEAD.size else 0


def _forget_old(states: Path) -> None:
    """Remove what is left of runs that no process has touched for a week."""
    for run in untouched(states.glob("*/*"), _KEPT_SECONDS):
        shutil.rmtree(run, ignore_errors=True)
