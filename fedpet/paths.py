"""Paths that a user names: expand them, make them absolute, refuse those that cannot be used.

A relative path is relative to the current directory of the process that was given it. It is made
absolute once, before anything is read (`Experiment.located`), so that what a run leaves behind
means the same from any directory.
"""

from __future__ import annotations

import os
from pathlib import Path

from fedpet.errors import ConfigError, InputError

__all__ = ["NO_HOME", "absolute", "check_output", "expand", "give_no_home"]

NO_HOME = "Could not determine home directory."  # the message of pathlib's RuntimeError


def give_no_home() -> ConfigError:
    """The error of a process that has no home folder."""
    return ConfigError(
        "there is no home folder: HOME is not set, and the user (id "
        f"{os.getuid()}) is not in the password file. Set HOME to a folder that can be written; "
        "FEDPET_CACHE, FLWR_HOME and HF_HOME name other places for the caches."
    )


def expand(path: str | Path) -> Path:
    """Replace a leading "~".

    Raises:
        ConfigError: There is no such user, or no home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        first = Path(path).parts[0]
        if first == "~":
            raise give_no_home() from None
        raise ConfigError(f"there is no user {first[1:]!r} to take {str(path)!r} from.") from None


def absolute(path: str | Path) -> Path:
    """A path from the root, for the same file; links stay as they are named.

    Raises:
        ConfigError: It begins with "~", and there is no such folder.
    """
    path = expand(path)
    if ".." in path.parts:  # after a link it is the parent of what the link leads to
        path = path.parent.resolve() / path.name
    return path.absolute()


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
