"""Write and read requests, and put bytes into Flower messages.

A request (server to node) names clients and carries the global values, a frame for each tier among
them (mostly one), and the plan where the node may lack it. A reply is one frame or refusal a
client, joined (fedpet/protocol/frame.py).

A request is a `Request` in MessagePack, see fedpet/protocol/wire_struct.py. A node with many
clients is sent several a round, and the global values in the first alone: those after it name them
(`HeldValues`).

A message holds one flat array, since Flower's cost follows the number of arrays and not their size.
"""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Sequence
from typing import Annotated, Any

from flwr.app import Array, ArrayRecord, Message, Metadata, RecordDict
from msgspec import Meta

from fedpet.config import MAX_TIERS
from fedpet.errors import FrameError
from fedpet.protocol.flower_compat.flower_messages import (
    CHUNK_BYTES,
    InflatableObject,
    make_message,
)
from fedpet.protocol.wire_struct import WireStruct, decode_struct, encode_struct

MAX_CLIENTS = 1_000_000
STYPE = "fedpet.bytes"  # Flower's name for the coding of an array; not one that it reads itself
SOME_CLIENT = 1 << 63  # stands for a client's number where only the size of a request matters

_HELD = b"\x94\xa5FPHV1"  # how `HeldValues` begins
_RECORD, _ARRAY = "fedpet", "bytes"
_SOME_ID = 1 << 62

Number = Annotated[int, Meta(ge=0)]  # of 64 bits, as MessagePack has them
Round = Annotated[int, Meta(ge=0, le=2**32 - 1)]


class Path(WireStruct, frozen=True):
    """A node's way to one tier's reference of the round.

    Attributes:
        changes: Number of frames, each the change of a round; 0 is one frame, the reference itself.
        checksum: Of the reference that must come out.
    """

    changes: Annotated[int, Meta(ge=0, le=2**16 - 1)]
    checksum: Annotated[int, Meta(ge=0, le=2**32 - 1)]


class HeldValues(WireStruct, frozen=True, tag="FPHV1"):
    """The name of a round's global values, which an earlier request brought.

    Attributes:
        digest: Of the plan, see fedpet/protocol/frame.py.
        server_round: Counted from 1.
        checksum: Of the frames, or of the references they lead to.
    """

    digest: Annotated[bytes, Meta(min_length=16, max_length=16)]
    server_round: Round
    checksum: Annotated[int, Meta(ge=0, le=2**32 - 1)]


class Request(WireStruct, frozen=True, tag="FPRQ2"):
    """A request to train these clients from these values.

    Attributes:
        clients: Numbers of the clients, see `fedpet.utils.seeds.client_id64`.
        frame: Packed frame with the global values; several, joined, where clients differ in tier,
            or where the values are reached by changes; or `HeldValues` in their place.
        plan: The plan's bytes, or nothing where the node is known to hold it.
        which: For each client, which of the tiers here is its own, from 0; () where there is one.
        run: Names the run among those of one plan; 0 where nothing of earlier rounds matters.
        paths: For each tier here, how its values are reached; () where each is one frame of values.
        accepted: For each client, the last round in which its update was accepted, 0 for none; ()
            without error feedback.
    """

    clients: Annotated[tuple[Number, ...], Meta(max_length=MAX_CLIENTS)]
    frame: bytes
    plan: bytes = b""
    which: Annotated[
        tuple[Annotated[int, Meta(ge=0, lt=MAX_TIERS)], ...], Meta(max_length=MAX_CLIENTS)
    ] = ()
    run: Number = 0
    paths: Annotated[tuple[Path, ...], Meta(max_length=MAX_TIERS)] = ()
    accepted: Annotated[tuple[Round, ...], Meta(max_length=MAX_CLIENTS)] = ()

    def __post_init__(self) -> None:
        for name in ("which", "accepted"):
            if (count := len(getattr(self, name))) not in (0, len(self.clients)):
                raise ValueError(
                    f"a request for {len(self.clients)} clients has {name!r} of none or of each, "
                    f"got {count}"
                )

    @property
    def held(self) -> HeldValues | None:
        """Name of the values where the request does not bring them.

        Raises:
            FrameError: It is cut short.
        """
        if not self.frame.startswith(_HELD):
            return None
        return decode_struct(self.frame, HeldValues, "name of a round's values")

    def name_values(self, digest: bytes, server_round: int) -> HeldValues:
        """Name the values that this request brings."""
        checksum = zlib.crc32(self.frame)
        if self.paths:  # nodes come to the same reference by different frames
            checksum = zlib.crc32(repr([path.checksum for path in self.paths]).encode())
        return HeldValues(digest, server_round, checksum)


class EvaluationRequest(Request, frozen=True, tag="FPEQ1"):
    """A request to measure these values alone: on the rows that the clients hold out, and on all
    rows of those that never train.

    It has one frame, coded anew and in full by the plan's codec, whatever the downlink is.
    """


_REQUESTS: Any = Request | EvaluationRequest


def write_request(request: Request) -> bytes:
    """Write a request."""
    return encode_struct(request)


def read_request(payload: bytes) -> Request:
    """Read a request.

    Raises:
        FrameError: The bytes are no request of this version.
    """
    found: Request = decode_struct(payload, _REQUESTS, "request")
    return found


def to_record(payload: bytes) -> RecordDict:
    """Wrap bytes as the one uint8 array of a Flower message, without a copy in numpy's format."""
    array = Array(dtype="uint8", shape=(len(payload),), stype=STYPE, data=payload)
    return RecordDict({_RECORD: ArrayRecord({_ARRAY: array})})


def from_record(record: RecordDict) -> bytes:
    """Return the bytes of a message's one uint8 array.

    Raises:
        FrameError: The message holds anything else.
    """
    try:
        array = record.array_records[_RECORD][_ARRAY]
    except (KeyError, AttributeError, TypeError):
        raise FrameError(f"a message holds one array {_RECORD}/{_ARRAY}, got others.") from None
    if array.dtype != "uint8" or array.stype != STYPE or array.shape != (len(array.data),):
        raise FrameError(
            f"a message's array is flat, of uint8 and of type {STYPE!r}, got shape "
            f"{array.shape}, {array.dtype} and {array.stype!r}."
        )
    return array.data


def wire_bytes(message: Message) -> int:
    """Return the size of a message as Flower serialises it, metadata and headers included."""
    if not message.has_content() or not _is_ours(message.content):
        return flower_bytes(message)
    count = len(from_record(message.content))
    envelope = flower_bytes(make_message(message.metadata, content=to_record(b"")))
    return envelope + _array_bytes(count) - _array_bytes(0)


def single_client_bytes(count: int, *, reply: bool) -> int:
    """Return the size of a message with `count` bytes to or from one device alone, with framing.

    The ids in its metadata are fixed, so that the same number always weighs the same.
    """
    return _single_envelope(reply) + _array_bytes(count) - _array_bytes(0)


def flower_bytes(message: InflatableObject) -> int:
    """Return what Flower serialises of a message or a part of it, by doing so."""
    return sum(len(part.deflate()) for part in _parts(message))


@functools.cache
def _single_envelope(reply: bool) -> int:
    """Return the size of such a message without a byte in it."""
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
    return flower_bytes(make_message(metadata, content=to_record(b"")))


def _is_ours(content: RecordDict) -> bool:
    """Tell if a message holds one array of bytes and nothing else."""
    try:
        from_record(content)
        return len(content) == len(content[_RECORD]) == 1
    except FrameError:
        return False


def _array_bytes(count: int) -> int:
    """Return what Flower makes of an array: its header, and its data in pieces with a header each.

    Serialising one would copy and hash it to learn a length that follows from `count`.
    """
    pieces = -(-count // CHUNK_BYTES)
    body = {"dtype": "uint8", "shape": [count], "stype": STYPE, "arraychunk_ids": [*range(pieces)]}
    size = _object_bytes("Array", pieces, len(json.dumps(body)))
    if pieces:
        size += (pieces - 1) * _object_bytes("ArrayChunk", 0, CHUNK_BYTES)
        size += _object_bytes("ArrayChunk", 0, count - (pieces - 1) * CHUNK_BYTES)
    return size


def _object_bytes(kind: str, children: int, body: int) -> int:
    """Return the size of one of Flower's objects: "KIND ID,ID BODY-LENGTH", a zero, the body."""
    ids = max(65 * children - 1, 0)
    return len(kind) + ids + len(str(body)) + 3 + body


def _parts(node: InflatableObject) -> Sequence[InflatableObject]:
    children = (node.children or {}).values()
    return [node, *(part for child in children for part in _parts(child))]
