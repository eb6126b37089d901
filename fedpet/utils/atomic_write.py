"""Write files and folders so that they are whole or absent, whatever ends the process."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = ["atomic_write", "sync", "untouched", "whole_folder"]


def atomic_write(
    path: Path, content: bytes, *, durable: bool = False, shared: bool = False
) -> None:
    """Put a file in its place, whole; one that was there before is replaced.

    Args:
        path: In a folder that exists.
        content: All of it.
        durable: Return only when the file would outlast a loss of power.
        shared: Several processes may write this file at once; only their user may read it.

    Raises:
        OSError: The disk does not take it. What was there before stays.
    """
    if shared:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    else:  # what a process that was killed left goes with the next one
        name = str(path.with_name(f".{path.name}"))
        handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    if durable and hasattr(os, "O_DIRECTORY"):  # not on Windows, which lets no folder be opened
        sync(path.parent, os.O_RDONLY | os.O_DIRECTORY)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder to fill, and put it in its place when it is full.

    Its files get the mode of any file of this user: some programs write theirs for the user alone.

    Args:
        path: The place. A folder that is there stays, since a disk may be mounted on it: the new
            files come into it when all of them are written.

    Raises:
        OSError: The disk does not take it. What was there before stays, half a new folder does not.
    """
    there = path.is_dir()
    building = path / ".building" if there else path.with_name(f".{path.name}")
    shutil.rmtree(building, ignore_errors=True)  # of a process that was killed
    building.mkdir(parents=True)
    try:
        yield building
        readable = building.stat().st_mode & 0o666
        for file in building.rglob("*"):
            if file.is_file():
                file.chmod(readable)
        if there:
            for file in building.iterdir():
                file.replace(path / file.name)
            building.rmdir()
        else:
            building.replace(path)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def sync(path: Path, how: int) -> None:
    """Bring a file, or a folder's list of names, to the disk."""
    handle = os.open(path, how)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def untouched(paths: Iterable[Path], seconds: float) -> list[Path]:
    """Return the `paths` that nobody has written or touched for so long."""
    oldest = time.time() - seconds
    old = []
    for path in paths:
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < oldest:
                old.append(path)
    return old
