"""Report an unforeseen error: one sentence for the user, the traceback in a file."""

from __future__ import annotations

import contextlib
import os
import platform
import select
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedpet import __version__

__all__ = ["is_of_paths", "report_fault", "watched_outputs"]


def report_fault(error: BaseException) -> str:
    """Write the traceback to a new file; return the sentence that names it.

    It lies in the folder of the run that failed (the error's attribute `folder`), and where there
    is none, in the folder for temporary files.
    """
    said = " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(": ")
    text = "".join(
        (
            f"{time.strftime('%Y-%m-%d %H:%M:%S')}, fedpet {__version__}, Python ",
            f"{platform.python_version()}, {platform.platform()}\n",
            f"{' '.join(sys.argv)}\n\n",
            *traceback.format_exception(error),
        )
    )
    where = f"The traceback could not be written to a file:\n{text}"
    places = [Path(vars(error).get("folder", tempfile.gettempdir())), Path(tempfile.gettempdir())]
    for folder in places:
        with contextlib.suppress(OSError):
            handle, name = tempfile.mkstemp(".log", "fedpet-error-", folder)
            with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
                file.write(text)
            where = f"Its traceback is in {name!r}: please report it with that file."
            break
    return f"something failed that fedpet does not foresee: {said}. {where}"


def is_of_paths(error: OSError, arguments: Iterable[str]) -> bool:
    """Return True for an error about a file of the command line, or one below it."""
    if not isinstance(error.filename, str):
        return False
    file = Path(error.filename).absolute()
    given = (part for argument in arguments for part in {argument, argument.rpartition("=")[2]})
    return any(part and file.is_relative_to(Path(part).absolute()) for part in given)


@contextmanager
def watched_outputs() -> Iterator[Callable[[], bool]]:
    """Give a function that returns True once a reader of the outputs has gone."""
    poll, watched = select.poll(), []
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):  # it may be closed
            watched.append(os.dup(descriptor))  # Rich puts another file in its place
            poll.register(watched[-1], 0)
    try:
        yield lambda: any(events & select.POLLERR for _, events in poll.poll(0))
    finally:
        for descriptor in watched:
            os.close(descriptor)
