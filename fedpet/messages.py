"""What a message between server and node holds: one uint8 array, read without trust.

A request (server to node) names a cohort of clients and carries the global values, a frame for
each tier among them (mostly one), and the plan where the node may lack it. A reply is one frame, or
one refusal, a client, joined.

    request := magic "FPRQ" | version u8 | mixed u8 | 2 reserved | clients u32 | plan bytes u32
               | frame bytes u32 | client numbers u64 ... | which frame u8 ... | plan | frame ...
               (little-endian; "which frame", one a client, is there where mixed is 1)
    reply   := frame ...                                        (fedpet/codec/frame.py)

One flat array, since Flower's cost follows the number of arrays and not their size.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from flwr.app import Array, ArrayRecord, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.supercore.inflatable.inflatable_object import InflatableObject

from fedpet.errors import FrameError

MAX_CLIENTS = 1_000_000
PLAN_MISSING = "this node does not hold the plan"
STYPE = "fedpet.bytes"  # how Flower names the coding of an array; not one that it reads itself
OTHER_TIER = "this node's tier is of density "  # and the number

_HEADER = struct.Struct("<4sBB2xIII")
_MAGIC = b"FPRQ"
_VERSION = 1
_RECORD, _ARRAY = "fedpet", "bytes"
_SOME_ID = 1 << 62


@dataclass(frozen=True)
class Request:
    """What a node is asked to do: train these clients from these values.

    Attributes:
        clients: Numbers of the clients, see `fedpet.seeds.client_number`.
        frame: Packed frame with the global values; several, joined, where clients differ in tier.
        plan: The plan's bytes, or nothing where the node is known to hold it.
        which: For each client, which of the frames is its own, from 0; () where there is one.
    """

    clients: tuple[int, ...]
    frame: bytes
    plan: bytes = b""
    which: tuple[int, ...] = ()


def write_request(request: Request) -> bytes:
    """Join a request's parts."""
    count = len(request.clients)
    sizes = count, len(request.plan), len(request.frame)
    header = _HEADER.pack(_MAGIC, _VERSION, bool(request.which), *sizes)
    numbers = struct.pack(f"<{count}Q", *request.clients)
    return b"".join((header, numbers, bytes(request.which), request.plan, request.frame))


def read_request(payload: bytes) -> Request:
    """Take a request apart; every length is checked before anything is read.

    Raises:
        FrameError: The bytes are no request of this version.
    """
    if len(payload) < _HEADER.size:
        raise FrameError(f"a request has at least {_HEADER.size} bytes, got {len(payload)}.")
    magic, version, mixed, count, plan_bytes, frame_bytes = _HEADER.unpack_from(payload)
    if magic != _MAGIC or version != _VERSION or mixed > 1:
        raise FrameError(
            f"a request starts with {_MAGIC!r} and version {_VERSION}, got {magic!r} and "
            f"{version}: run the same fedpet on the server and on the nodes."
        )
    expected = _HEADER.size + (8 + mixed) * count + plan_bytes + frame_bytes
    if count > MAX_CLIENTS or expected != len(payload):
        raise FrameError(
            f"a request for {count} clients with these parts has {expected} bytes, got "
            f"{len(payload)}."
        )
    numbers = _HEADER.size + 8 * count
    start = numbers + mixed * count
    return Request(
        clients=struct.unpack_from(f"<{count}Q", payload, _HEADER.size),
        which=tuple(payload[numbers:start]),
        plan=payload[start : start + plan_bytes],
        frame=payload[start + plan_bytes :],
    )


def to_record(payload: bytes) -> RecordDict:
    """Wrap bytes as the one uint8 array of a Flower message, without a copy in numpy's format."""
    array = Array(dtype="uint8", shape=(len(payload),), stype=STYPE, data=payload)
    return RecordDict({_RECORD: ArrayRecord({_ARRAY: array})})


def from_record(record: RecordDict) -> bytes:
    """The bytes of a message's one uint8 array.

    Raises:
        FrameError: The message holds anything else.
    """
    try:
        array = record.array_records[_RECORD][_ARRAY]
    except KeyError:
        raise FrameError(f"a message holds one array {_RECORD}/{_ARRAY}, got others.") from None
    if array.dtype != "uint8" or array.stype != STYPE or array.shape != (len(array.data),):
        raise FrameError(
            f"a message's array is flat, of uint8 and of type {STYPE!r}, got shape "
            f"{array.shape}, {array.dtype} and {array.stype!r}."
        )
    return array.data


def wire_bytes(message: Message) -> int:
    """Bytes of a message as Flower serialises it: metadata, records, arrays and their headers."""
    return sum(len(part.deflate()) for part in _parts(message))


def solo_bytes(payload: bytes, *, reply: bool) -> int:
    """What a message with this payload weighs to or from one device alone, framing included.

    The ids in its metadata are fixed, so that the same payload always weighs the same.
    """
    metadata = Metadata(
        run_id=_SOME_ID,
        message_id="",
        src_node_id=_SOME_ID,
        dst_node_id=_SOME_ID,
        reply_to_message_id="0" * 64 if reply else "",
        group_id="",
        created_at=1.5e9,
        ttl=43200.0,
        message_type="train",
        src_task_id=_SOME_ID,
        dst_task_id=_SOME_ID,
    )
    return wire_bytes(make_message(metadata, content=to_record(payload)))


def _parts(node: InflatableObject) -> Sequence[InflatableObject]:
    children = (node.children or {}).values()
    return [node, *(part for child in children for part in _parts(child))]
