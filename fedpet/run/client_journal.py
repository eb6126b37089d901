"""Write what the server records of each client, after a round those that changed, and read it.

In:  the records of clients (fedpet/server/client_records.py).
Out: RUN/journal.clients-N: lines of JSON, `{"NAME": [has_plan, accepted, tier, reference], ...}`,
     of which a later one replaces what earlier ones say of the same client.

The journal of a round (fedpet/run/checkpoint_file.py) names the file, how many of its bytes are
valid and their SHA-256: what a crash left behind them is not read. A process begins a file of its
own with the records of all clients, and so it does when the changes have become several times as
long. The journal that names the new file takes the place of one that names the old, and after that
the old one goes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from fedpet.errors import ConfigError
from fedpet.server.client_records import ClientRecord, ClientRecords
from fedpet.utils.atomic_write import sync

__all__ = ["ClientJournal", "Written", "read_records", "remove_client_journals"]

_PREFIX = "journal.clients-"
_LEAST_BYTES = 1 << 16  # of a file that is not yet begun anew
_MOST_TIMES = 3  # its first length


class Written(NamedTuple):
    """The valid part of a file."""

    file: str = ""  # "" is of no client
    num_bytes: int = 0
    sha256: str = ""


class ClientJournal:
    """Write the records of one strategy's clients.

    Args:
        folder: The run's.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path: Path | None = None

    def write(self, records: ClientRecords) -> Written:
        """Bring the changes since the last call to the disk; at first, and at times, everything.

        Raises:
            OSError: The disk does not take it.
        """
        if self._path is None or self._num_bytes > max(_LEAST_BYTES, _MOST_TIMES * self._first):
            self._begin(records)
        elif changed := records.changed_records():
            self._append(changed)
        assert self._path is not None
        return Written(self._path.name, self._num_bytes, self._digest.hexdigest())

    def remove_older(self) -> None:
        """Take away the files that the journal no longer names."""
        for path in self._folder.glob(f"{_PREFIX}*"):
            if path != self._path:
                path.unlink(missing_ok=True)

    def _begin(self, records: ClientRecords) -> None:
        numbers = [int(p.name.removeprefix(_PREFIX)) for p in self._folder.glob(f"{_PREFIX}*")]
        self._path = self._folder / f"{_PREFIX}{max(numbers, default=0) + 1}"
        self._num_bytes, self._digest = 0, hashlib.sha256()
        records.changed_records()  # they are among all
        self._append(records.all_records())
        self._first = self._num_bytes
        if hasattr(os, "O_DIRECTORY"):
            sync(self._folder, os.O_RDONLY | os.O_DIRECTORY)

    def _append(self, records: Mapping[str, ClientRecord]) -> None:
        assert self._path is not None
        line = json.dumps(records).encode() + b"\n"
        with self._path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._num_bytes += len(line)
        self._digest.update(line)


def read_records(folder: Path, written: Written) -> dict[str, ClientRecord]:
    """Read the valid part of a file.

    Raises:
        ConfigError: It is not there, or was damaged.
    """
    if not written.file:
        return {}
    path = folder / Path(written.file).name
    try:
        content = path.read_bytes()[: written.num_bytes]
    except OSError as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {error.strerror or error}.") from None
    if hashlib.sha256(content).hexdigest() != written.sha256:
        raise ConfigError(f"the checksum of {str(path)!r} is wrong: it was damaged on the disk.")
    records = {}
    for line in content.splitlines():
        for name, record in json.loads(line).items():
            records[name] = ClientRecord(*record)
    return {name: record for name, record in records.items() if record != ClientRecord()}


def remove_client_journals(folder: Path) -> None:
    """Take away all files of a run that has its result."""
    for path in folder.glob(f"{_PREFIX}*"):
        path.unlink(missing_ok=True)
