"""Find a place for Ray: the cluster that RAY_ADDRESS names, or a folder of this machine.

Both are looked at before anything is read or made: Ray itself knocks at a dead address for a
quarter of an hour, and finds out late that the paths of its sockets are too long.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from fedpet.errors import ConfigError, RunError

CONNECT_SECONDS = 5.0
LONGEST_SOCKET = (104 if sys.platform == "darwin" else 108) - 1  # bytes of an AF_UNIX path
FALLBACK = Path("/tmp")  # short, and there on every machine with such sockets
PREFIX = "fedpet-"
# The longest path that Ray makes in the folder: its session is named by the time and the process.
_BELOW = f"/{PREFIX}12345678/session_2026-01-01_00-00-00_123456_{os.getpid()}/sockets/plasma_store"
LONGEST_FOLDER = LONGEST_SOCKET - len(_BELOW)  # bytes


def cluster_address() -> str | None:
    """Return the cluster that RAY_ADDRESS names, once it answers; None to start one.

    Raises:
        RunError: Nobody answers.
        ConfigError: It is no address.
    """
    named = os.environ.get("RAY_ADDRESS", "").strip()
    if named in ("", "local"):
        return None
    host, port = _host_and_port(named)
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise RunError(
            f"no Ray cluster answers at {host}:{port}, where RAY_ADDRESS={named!r} leads "
            f"({error.strerror or error}): start it (`ray start --head`), or unset RAY_ADDRESS to "
            "run on this machine alone."
        ) from None
    return named


def _host_and_port(named: str) -> tuple[str, int]:
    address = named
    if named == "auto":
        # Private to Ray, whose version Flower pins (2.55.1): where `ray start` left its address.
        from ray._private.services import get_ray_address_from_environment

        try:
            address = get_ray_address_from_environment("auto", None)
        except ConnectionError:
            raise RunError(
                "RAY_ADDRESS is 'auto', and no Ray cluster runs on this machine: start it (`ray "
                "start --head`), or unset RAY_ADDRESS."
            ) from None
    if address.startswith("ray://"):
        raise ConfigError(
            f"RAY_ADDRESS={named!r} reaches a cluster from outside, and a run hands its checkpoint "
            "and rows out from one of its machines: start it there, with RAY_ADDRESS=HOST:6379."
        )
    try:
        parts = urlsplit(f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:  # a port that is no number
        host = port = None
    if not host or not port:
        raise ConfigError(f"RAY_ADDRESS must be host:port, 'auto' or 'local', got {named!r}.")
    return host, port


def ray_folder() -> Path:
    """Return a folder in which Ray's own may lie: its sockets need a short path.

    RAY_TMPDIR where it is set; else the folder for temporary files, or /tmp where that one's path
    is too long.

    Raises:
        ConfigError: RAY_TMPDIR is absent, or too long; or no folder is short enough.
    """
    if named := os.environ.get("RAY_TMPDIR"):
        folder = Path(named).absolute()
        if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
            raise ConfigError(
                f"RAY_TMPDIR={named!r} is no folder that can be written to: make it, name another "
                "or unset it."
            )
        if not _is_short(folder):
            raise ConfigError(
                f"Ray's folder must have a path of at most {LONGEST_FOLDER} bytes, for the sockets "
                f"in it, and RAY_TMPDIR={named!r} has {_length(folder)}: name a shorter one."
            )
        return folder
    usual = Path(tempfile.gettempdir())
    for folder in (usual, FALLBACK):
        if _is_short(folder) and folder.is_dir() and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise ConfigError(
        f"Ray's folder must have a path of at most {LONGEST_FOLDER} bytes, for the sockets in it: "
        f"{str(usual)!r} has {_length(usual)}, and {str(FALLBACK)!r} cannot be written to. Name a "
        "short folder with RAY_TMPDIR."
    )


def _length(folder: Path) -> int:
    return len(os.fsencode(folder.absolute()))


def _is_short(folder: Path) -> bool:
    return _length(folder) <= LONGEST_FOLDER
