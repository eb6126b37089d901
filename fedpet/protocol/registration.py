"""Write and read a registration: the clients of a node, and how many rows each holds.

The server asks with a request that names no client and carries no values, only the plan; see
fedpet/protocol/request.py. Names and counts are all that it learns of the rows. A node that cannot
take part answers with a refusal in the registration's place, and the caller is told its reason.

A registration is MessagePack (fedpet/protocol/wire_struct.py): a pair (name, rows) for each client,
in the order of the names, and a pair (package, version) for each of those that decide a result.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from fedpet.errors import FrameError, ReplyError
from fedpet.protocol.frame import Refusal, unpack_frames
from fedpet.protocol.wire_struct import WireStruct, decode_struct, encode_struct

__all__ = ["Registration", "decode_registration", "encode_registration"]

_NONE: Mapping[str, str] = {}
MAX_CLIENTS = 100_000
MAX_NAME_BYTES = 256

Entry = tuple[
    Annotated[str, Meta(min_length=1, max_length=MAX_NAME_BYTES)],
    Annotated[int, Meta(ge=1, le=2**32 - 1)],
]


Version = tuple[Annotated[str, Meta(max_length=32)], Annotated[str, Meta(max_length=80)]]


class _Registration(WireStruct, frozen=True, tag="FPRS3"):
    clients: Annotated[tuple[Entry, ...], Meta(min_length=1, max_length=MAX_CLIENTS)]
    versions: Annotated[tuple[Version, ...], Meta(max_length=16)]


@dataclass(frozen=True)
class Registration:
    """Hold what a node brings.

    Attributes:
        num_rows: Client -> rows it holds.
        versions: Package -> version, as the node says.
    """

    num_rows: dict[str, int]
    versions: dict[str, str]


def encode_registration(num_rows: Mapping[str, int], versions: Mapping[str, str] = _NONE) -> bytes:
    """Write clients and their rows, and versions of packages.

    Raises:
        FrameError: A name that a server would refuse, or too many of them.
    """
    try:
        clients, packages = tuple(sorted(num_rows.items())), tuple(sorted(versions.items()))
        payload = encode_struct(_Registration(clients, packages))
    except UnicodeEncodeError as error:
        raise FrameError(f"a client's name is UTF-8, got {error.object[:40]!r}.") from None
    _decode(payload)
    return payload


def decode_registration(payload: bytes) -> Registration:
    """Read a node's answer.

    Raises:
        ReplyError: The node refuses, or its answer is no registration of this version.
    """
    if payload[:2] == b"FP":  # a frame
        raise ReplyError(_reason(payload))
    return _decode(payload)


def _decode(payload: bytes) -> Registration:
    num_rows: dict[str, int] = {}
    read = decode_struct(payload, _Registration, "registration")
    for name, rows in read.clients:
        if len(name.encode()) > MAX_NAME_BYTES or not name.strip():
            raise FrameError(
                f"a client's name has 1 to {MAX_NAME_BYTES} bytes and is not blank, got "
                f"{len(name.encode())} bytes, {name[:40]!r}."
            )
        if any(unicodedata.category(character)[0] == "C" for character in name):
            raise FrameError(f"a client's name has no control characters, got {name!r}.")
        if name in num_rows:
            raise FrameError(f"a registration names each client once, got {name!r} twice.")
        num_rows[name] = rows
    return Registration(num_rows, dict(read.versions))


def _reason(payload: bytes) -> str:
    """Return the node's own reason, if it refused as it should."""
    parts = list(unpack_frames(payload, max_frames=1, max_payload_bytes=0))
    if len(parts) == 1 and isinstance(parts[0], Refusal):
        return parts[0].text
    return "the answer to the roll call is neither a registration nor a refusal."
