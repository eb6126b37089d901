"""Write and read typed messages as MessagePack (msgspec), for all formats but the frame.

A message is an array that opens with the name and version of its format. Reading holds every field
against its type: an unknown version, a missing or additional field, another type, a number out of
range and bytes behind the end are refused, and every count is checked before anything is allocated.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from fedpet.errors import FrameError, ReplyError

__all__ = ["WireStruct", "decode_struct", "encode_struct"]


class WireStruct(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """A message or a part of one; a message has a `tag`, its format's name and version."""


S = TypeVar("S", bound=WireStruct)


def encode_struct(message: WireStruct) -> bytes:
    """Write a message; equal messages give equal bytes."""
    return msgspec.msgpack.encode(message)


def decode_struct(
    payload: bytes, kind: type[S], name: str, *, error: type[ReplyError] = FrameError
) -> S:
    """Read a message.

    Args:
        payload: Bytes of `encode_struct`, or any others.
        kind: The message's type.
        name: The message's name in the error's sentence.
        error: Raised for bytes that are no such message.
    """
    try:
        return msgspec.msgpack.decode(payload, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as wrong:
        raise error(
            f"the {name} does not read: {wrong}. Run the same fedpet on the server and on the "
            "nodes."
        ) from None
