"""Load the compiled kernels, once a process has so much to code that they pay.

In:  how many values are about to be coded.
Out: the module fedpet/codec/compiled.py, or None where numpy does the work.

Both give the same bits, so it never matters which one worked. numba, which compiles the kernels, is
an extra (`pip install fedpet[fast]`) and takes half a second to import: a process loads it when it
has coded as many values as cost numpy that much, and a device that sends one update never does.

The machine code is kept in fedpet's cache by version and processor, so that it is compiled once a
machine. Processes that start together wait for the first one to compile. Where nothing can be
written, each compiles for itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

__all__ = ["compiled_kernels", "use_kernels"]

Choice = Literal["auto", "numpy", "compiled"]

PAYS_AFTER = 50_000_000  # values through a kernel, on which numpy loses a third of a second

LOG = logging.getLogger("fedpet")

_lock = threading.Lock()
_choice: Choice = "auto"
_coded = 0
_module: ModuleType | None = None
_failed = False


def use_kernels(choice: Choice) -> None:
    """Choose the kernels of this process: "numpy", "compiled", or "auto", compiled when they pay.

    Raises:
        ImportError: They should be compiled, and numba is not installed.
    """
    global _choice
    if choice == "compiled":
        _load()
    _choice = choice


def compiled_kernels(num_values: int) -> ModuleType | None:
    """Return the compiled kernels for so many values, or None: numpy is to do it."""
    global _coded, _failed
    if _choice == "numpy" or _failed:
        return None
    if _module is None:
        _coded += num_values
        if _coded < PAYS_AFTER:
            return None
        try:
            _load()
        except Exception as error:  # an extra that is absent or broken must not end a run
            _failed = True
            if importlib.util.find_spec("numba"):
                LOG.warning("numba cannot compile the codec's kernels, numpy goes on: %s", error)
    return _module


def _load() -> None:
    global _module
    with _lock:
        if _module is None:
            from numba import config

            settings: Any = config  # its names are set at run time
            if settings.DISABLE_JIT:
                raise ImportError("NUMBA_DISABLE_JIT is set.")
            before = settings.CACHE_DIR
            with _cache_folder() as folder:
                try:
                    settings.CACHE_DIR = folder
                    from fedpet.codec import compiled
                finally:
                    settings.CACHE_DIR = before
            _module = compiled


@contextlib.contextmanager
def _cache_folder() -> Iterator[str]:
    """Return a locked folder for machine code; "" where none can be made, or numba's is set."""
    if os.environ.get("NUMBA_CACHE_DIR"):
        yield os.environ["NUMBA_CACHE_DIR"]
        return
    with contextlib.ExitStack() as stack:
        try:
            folder = Path(os.environ.get("FEDPET_CACHE") or "~/.cache/fedpet").expanduser()
            folder = folder.absolute() / "kernels"
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((folder / "lock").open("w"))
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
        except (OSError, RuntimeError):  # nothing can be written, or there is no home
            yield ""
            return
        yield str(folder)
