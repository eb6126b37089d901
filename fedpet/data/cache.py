"""Store arrays that were computed once, in a folder named after what they came from.

In:  a key, of everything the result depends on but the way that this package reads and splits, and
     a function that computes the result.
Out: an `Entry`, its arrays memory-mapped.

Two processes may compute the same entry at once: each writes a folder of its own and renames it
when it is whole. The first one's stays, and it holds the same bytes. Who may read and write the
root may read and write what is below: users can share a cache, and one who may only read it reads.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedpet.data.array_spool import save_array
from fedpet.errors import AbsentDataError, DataError

# Raise it when the same files and settings give other rows, labels, clients or tokens than before.
FORMAT = 2
# Kinds of what is made of rows.
OF_ROWS = ("census", "clients", "labels", "owners", "packed", "paths", "rows")
_DAMAGED = (OSError, EOFError, ValueError, KeyError)


@dataclass(frozen=True)
class Entry:
    """Arrays by name, and what else belongs to them: anything JSON can hold."""

    arrays: Mapping[str, np.ndarray]  # of one that is to be stored: or `ArraySpool`
    meta: Mapping[str, Any]


def cached(cache: Path, kind: str, key: Mapping[str, Any], compute: Callable[[], Entry]) -> Entry:
    """Open the entry of this key, computing and storing it where it is absent or damaged.

    Args:
        cache: Root of the cache; made where it is absent.
        kind: Folder below the root, such as "rows".
        key: Everything the entry depends on, as JSON values. `FORMAT` is part of every key without
            being named.
        compute: Called without arguments on a miss only. Its errors pass through.

    Raises:
        DataError: The entry must be stored, and the cache cannot be written.
    """
    canonical = json.dumps({**key, "format": FORMAT}, sort_keys=True)
    folder = cache / kind / hashlib.sha256(canonical.encode()).hexdigest()[:32]
    if folder.is_dir():
        try:
            entry = _open(folder)
            with contextlib.suppress(OSError):  # of another user's cache
                os.utime(folder)  # its last use, see `drop_unused`
            return entry
        except _DAMAGED:  # cut short, or edited: compute it anew
            shutil.rmtree(folder, ignore_errors=True)
    entry = compute()
    try:
        _store(folder, entry)
        return _open(folder)
    except _DAMAGED as error:
        raise unwritable(cache, error) from None


def drop_unused(cache: Path, since: float) -> None:
    """Remove what was made of rows and not used for some time.

    Args:
        cache: Of one process that alone uses it.
        since: Time from which on an entry counts as used, in seconds since 1970.
    """
    for kind in OF_ROWS:
        for folder in (cache / kind).glob("*"):
            with contextlib.suppress(OSError):
                if folder.stat().st_mtime < since:
                    shutil.rmtree(folder, ignore_errors=True)


def unwritable(cache: Path, error: Exception) -> DataError:
    """Say that a cache cannot be written, and what to do."""
    reason = getattr(error, "strerror", None) or error
    return AbsentDataError(
        f"the cache {str(cache)!r} cannot be written: {reason}. Name a "
        "folder that can be, with room for the tokenised rows, by run.cache or $FEDPET_CACHE."
    )


def _open(folder: Path) -> Entry:
    content = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    arrays = {
        # A plain view: indexing a memmap costs several times as much.
        name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False))
        for name in content["arrays"]
    }
    return Entry(arrays, content["meta"])


def _store(folder: Path, entry: Entry) -> None:
    kind = folder.parent
    kind.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        kind.mkdir()
        root_mode = stat.S_IMODE(kind.parent.stat().st_mode)
        if root_mode & (stat.S_IWGRP | stat.S_IWOTH):  # several users write here
            kind.chmod(root_mode)
    building = kind / f".building-{uuid.uuid4().hex}"
    building.mkdir()
    try:
        for name, array in entry.arrays.items():
            save_array(building / f"{name}.npy", array)
        content = {"arrays": sorted(entry.arrays), "meta": entry.meta}
        (building / "meta.json").write_text(json.dumps(content), encoding="utf-8")
        try:
            os.rename(building, folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
