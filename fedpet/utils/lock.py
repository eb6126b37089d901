"""Lock a folder against a second process, for as long as the first one works in it.

In:  the folder of a run, of a search's state, of a model to be written.
Out: nothing that stays: the lock is the kernel's, on a hidden file, and ends with its process,
     however that ends. A lock file that a crash leaves behind locks nothing.

No child process holds the lock: Python closes the file in whatever it starts. Some network file
systems have no locks; there the work goes on without one, and says so.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedpet.errors import ConfigError

__all__ = ["LOCK_FILE", "locked", "locked_folder", "made_folder", "make_folder"]

LOCK_FILE = ".lock"
_MOST_HOLDER_BYTES = 200

log = logging.getLogger(__name__)


@contextmanager
def locked_folder(folder: Path, *, new: bool = False) -> Iterator[None]:
    """Make a folder where it is absent, and lock it; one that was made and stays empty goes again.

    Args:
        folder: The folder.
        new: It must not be there.

    Raises:
        FileExistsError: It is there, and should be new.
        ConfigError: It cannot be made, or another process works in it.
    """
    with made_folder(folder, new=new), locked(folder / LOCK_FILE, folder):
        try:
            yield
        except Exception as error:
            vars(error).setdefault("folder", folder)  # the command line leaves its log there
            raise


@contextmanager
def made_folder(folder: Path, *, new: bool = False) -> Iterator[None]:
    """Make a folder with its parents; those that were absent and stay empty go again."""
    absent = make_folder(folder, new=new)
    try:
        yield
    finally:
        _remove_empty(absent)


def make_folder(folder: Path, *, new: bool = False) -> list[Path]:
    """Make a folder with its parents.

    Returns:
        Those that were absent, the innermost first.

    Raises:
        FileExistsError: It is there, and should be new.
        ConfigError: It cannot be made.
    """
    absent: list[Path] = []
    try:
        absent += (path for path in (folder, *folder.parents) if not path.exists())
        folder.mkdir(parents=True, exist_ok=not new)
    except OSError as error:
        if new and isinstance(error, FileExistsError):
            raise
        _remove_empty(absent)
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror
        raise ConfigError(f"the folder {str(folder)!r} cannot be made: {reason}.") from None
    return absent


@contextmanager
def locked(file: Path, what: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock on a file, which is made for it and goes with it.

    Args:
        file: The lock's.
        what: The folder or file that it guards, for the message.
        wait: Wait for a process that holds it, in the place of the refusal.

    Raises:
        ConfigError: Another process holds it, or the file cannot be made.
    """
    handle = _take(file, what, wait)
    try:
        yield
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):
                file.unlink()
            os.close(handle)


def _take(file: Path, what: Path, wait: bool) -> int | None:
    """Return the locked file's descriptor; None where the file system has no locks."""
    while True:
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(
                f"{str(what)!r} cannot be written: {error.strerror or error}."
            ) from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            holder = _holder(handle)
            os.close(handle)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                log.warning(
                    "%r is not locked (%s): see to it that no other process works in it.",
                    str(what),
                    error.strerror or error,
                )
                return None
            raise ConfigError(
                f"another process works in {str(what)!r}{holder}: wait until it has ended, or "
                "name another place with --out."
            ) from None
        if _is_at(file, handle):
            with contextlib.suppress(OSError):  # a full disk: nobody reads who it is
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"process {os.getpid()} on {platform.node()}".encode(), 0)
            return handle
        os.close(handle)  # whoever held it took the file away: once more


def _is_at(file: Path, handle: int) -> bool:
    """Return True if an open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def _holder(handle: int) -> str:
    """Return the holder of the lock, as it wrote into the file."""
    with contextlib.suppress(OSError):
        if holder := os.pread(handle, _MOST_HOLDER_BYTES, 0).decode(errors="replace"):
            return f" ({holder})"
    return ""


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders as long as they are empty, the innermost first."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
