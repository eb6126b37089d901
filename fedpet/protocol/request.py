"""Write and read requests, and put bytes into Flower messages.

A request (server to node) names clients and carries the global values, a frame for each tier among
them (mostly one), and the plan where the node may lack it. A reply is one frame or refusal a
client, joined (fedpet/protocol/frame.py).

A request is a `Request` in MessagePack, see fedpet/protocol/wire_struct.py.

A message holds one flat array, since Flower's cost follows the number of arrays and not their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from flwr.app import Array, ArrayRecord, Message, Metadata, RecordDict
from msgspec import Meta

from fedpet.config import MAX_TIERS
from fedpet.errors import FrameError
from fedpet.protocol.flower_compat import InflatableObject, make_message
from fedpet.protocol.wire_struct import WireStruct, decode_struct, encode_struct

MAX_CLIENTS = 1_000_000
STYPE = "fedpet.bytes"  # Flower's name for the coding of an array; not one that it reads itself
SOME_CLIENT = 1 << 63  # stands for a client's number where only the size of a request matters

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


class Request(WireStruct, frozen=True, tag="FPRQ2"):
    """A request to train these clients from these values.

    Attributes:
        clients: Numbers of the clients, see `fedpet.utils.seeds.client_id64`.
        frame: Packed frame with the global values; several, joined, where clients differ in tier,
            or where the values are reached by changes.
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


def write_request(request: Request) -> bytes:
    """Write a request."""
    return encode_struct(request)


def read_request(payload: bytes) -> Request:
    """Read a request.

    Raises:
        FrameError: The bytes are no request of this version.
    """
    return decode_struct(payload, Request, "request")


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
    return sum(len(part.deflate()) for part in _parts(message))


def single_client_bytes(payload: bytes, *, reply: bool) -> int:
    """Return the size of a message with this payload to or from one device alone, with framing.

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
