"""Expand paths that a user names, make them absolute, refuse those that cannot be used.

A relative path is relative to the current directory of the process that was given it. It is made
absolute once, before anything is read (`Experiment.located`), so that what a run leaves behind
means the same from any directory.
"""

from __future__ import annotations

import os
from pathlib import Path

from fedpet.errors import ConfigError, InputError

__all__ = [
    "NO_HOME",
    "absolute",
    "cache_root",
    "check_output",
    "expand",
    "give_no_home",
    "replace_home",
]

NO_HOME = "Could not determine home directory."  # the message of pathlib's RuntimeError


def replace_home() -> None:
    """Let libraries that ask for a home folder, where there is none, take FEDPET_CACHE instead.

    A container's user often has no home; Flower asks for one when it is imported.
    """
    cache = os.environ.get("FEDPET_CACHE")
    if cache and os.path.expanduser("~") == "~":
        for name, folder in (("FLWR_HOME", "flwr"), ("HF_HOME", "hub")):
            os.environ.setdefault(name, os.path.abspath(os.path.join(cache, folder)))


def give_no_home() -> ConfigError:
    """Return the error of a path with "~", or of a library's, for which there is no folder."""
    if os.path.expanduser("~") != "~":
        return ConfigError("a path begins with '~' and the name of a user that there is not.")
    return ConfigError(
        f"there is no home folder: HOME is not set, and the user with the id {os.getuid()} is not "
        "in the password file. Set HOME, or FEDPET_CACHE, to a folder that can be written."
    )


def expand(path: str | Path) -> Path:
    """Replace a leading "~".

    Raises:
        ConfigError: There is no such user, or no home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise give_no_home() from None


def absolute(path: str | Path) -> Path:
    """Return the absolute path of the same file; links stay as they are named.

    Raises:
        ConfigError: It begins with "~", and there is no such folder.
    """
    path = expand(path)
    if ".." in path.parts:  # after a link it is the parent of what the link leads to
        path = path.parent.resolve() / path.name
    return path.absolute()


def cache_root(named: str = "") -> Path:
    """Return the folder of what is computed once: `run.cache`, $FEDPET_CACHE, ~/.cache/fedpet.

    Args:
        named: `run.cache` of an experiment; "" where it names none.

    Raises:
        ConfigError: It begins with "~", and there is no such folder.
    """
    return absolute(named or os.environ.get("FEDPET_CACHE") or "~/.cache/fedpet")


def check_output(path: Path) -> None:
    """Refuse a file that could not be written, before the work that would fill it.

    Raises:
        InputError: It is a folder, lies in none, or may not be written.
    """
    folder = path.parent
    try:
        if path.is_dir():
            reason = "it is a folder: name a file"
        elif path.exists():
            reason = "" if os.access(path, os.W_OK) else "permission denied"
        elif not folder.is_dir():
            reason = f"there is no folder {str(folder)!r}: make it first"
        else:
            reason = "" if os.access(folder, os.W_OK | os.X_OK) else "permission denied"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise InputError(f"{str(path)!r} cannot be written: {reason}.")
