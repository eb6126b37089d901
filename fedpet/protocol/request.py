"""What a message between server and node holds: one uint8 array, read without trust.

A request (server to node) names a cohort of clients and carries the global values, a frame for
each tier among them (mostly one), and the plan where the node may lack it. A reply is one frame, or
one refusal, a client, joined.

    request := magic "FPRQ" | version u8 | parts u8 | paths u8 | reserved u8 | clients u32
               | plan bytes u32 | frame bytes u32 | client numbers u64 ...
               | MIXED: which tier u8 ...             one a client
               | PATHS or ACCEPTED: run u64
               | PATHS: (changes u16 | CRC-32 u32) ...        one a tier, see
               fedpet/protocol/shared_reference.py
               | ACCEPTED: round u32 ...              one a client, see fedpet/client/state_store.py
               | plan | frame ...
    reply   := frame ...                                        (fedpet/protocol/frame.py)

All is little-endian; `parts` says which parts are there. Most requests have none of them: clients
of one tier, to whom nothing of earlier rounds matters.

One flat array, since Flower's cost follows the number of arrays and not their size.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from flwr.app import Array, ArrayRecord, Message, Metadata, RecordDict

from fedpet.config import MAX_TIERS
from fedpet.errors import FrameError
from fedpet.protocol.flower_compat import InflatableObject, make_message

MAX_CLIENTS = 1_000_000
# What a client says that can be asked again, and then rightly.
PLAN_MISSING = "this node does not hold the plan"
REFERENCE_MISSING = "this node does not hold the reference that the changes are of"
RESIDUAL_MISSING = "this node does not hold what the client's last accepted round left"
STYPE = "fedpet.bytes"  # how Flower names the coding of an array; not one that it reads itself
OTHER_TIER = "this node's tier is of density "  # and the number

_HEADER = struct.Struct("<4sBBBxIII")
_RUN, _PATH = struct.Struct("<Q"), struct.Struct("<HI")
_MIXED, _PATHS, _ACCEPTED = 1, 2, 4  # bits of `parts`
_MAGIC = b"FPRQ"
_VERSION = 1
_RECORD, _ARRAY = "fedpet", "bytes"
_SOME_ID = 1 << 62


@dataclass(frozen=True)
class Path:
    """How a node comes to one tier's reference of the round.

    Attributes:
        changes: How many frames, each the change of a round; 0 is one frame, the reference itself.
        checksum: Of the reference that must come out.
    """

    changes: int
    checksum: int


@dataclass(frozen=True)
class Request:
    """What a node is asked to do: train these clients from these values.

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

    clients: tuple[int, ...]
    frame: bytes
    plan: bytes = b""
    which: tuple[int, ...] = ()
    run: int = 0
    paths: tuple[Path, ...] = ()
    accepted: tuple[int, ...] = ()


def write_request(request: Request) -> bytes:
    """Join a request's parts."""
    count = len(request.clients)
    parts = _MIXED * bool(request.which)
    parts |= _PATHS * bool(request.paths) | _ACCEPTED * bool(request.accepted)
    sizes = count, len(request.plan), len(request.frame)
    return b"".join(
        (
            _HEADER.pack(_MAGIC, _VERSION, parts, len(request.paths), *sizes),
            struct.pack(f"<{count}Q", *request.clients),
            bytes(request.which),
            _RUN.pack(request.run) if parts > _MIXED else b"",
            *(_PATH.pack(path.changes, path.checksum) for path in request.paths),
            struct.pack(f"<{len(request.accepted)}I", *request.accepted),
            request.plan,
            request.frame,
        )
    )


def read_request(payload: bytes) -> Request:
    """Take a request apart; every length is checked before anything is read.

    Raises:
        FrameError: The bytes are no request of this version.
    """
    if len(payload) < _HEADER.size:
        raise FrameError(f"a request has at least {_HEADER.size} bytes, got {len(payload)}.")
    magic, version, parts, num_paths, count, plan_bytes, frame_bytes = _HEADER.unpack_from(payload)
    if magic != _MAGIC or version != _VERSION or parts > (_MIXED | _PATHS | _ACCEPTED):
        raise FrameError(
            f"a request starts with {_MAGIC!r} and version {_VERSION}, got {magic!r} and "
            f"{version}: run the same fedpet on the server and on the nodes."
        )
    sizes = (
        8 * count,
        count if parts & _MIXED else 0,
        _RUN.size if parts > _MIXED else 0,
        _PATH.size * num_paths,
        4 * count if parts & _ACCEPTED else 0,
        plan_bytes,
        frame_bytes,
    )
    expected = _HEADER.size + sum(sizes)
    if (
        count > MAX_CLIENTS
        or expected != len(payload)
        or bool(num_paths) != bool(parts & _PATHS)
        or num_paths > MAX_TIERS
    ):
        raise FrameError(
            f"a request for {count} clients with these parts has {expected} bytes, got "
            f"{len(payload)}."
        )
    stops = list(itertools.accumulate(sizes, initial=_HEADER.size))
    numbers, which, run, paths, accepted, plan, frame = (
        payload[start:stop] for start, stop in itertools.pairwise(stops)
    )
    return Request(
        clients=struct.unpack(f"<{count}Q", numbers),
        which=tuple(which),
        run=_RUN.unpack(run)[0] if run else 0,
        paths=tuple(Path(*path) for path in _PATH.iter_unpack(paths)),
        accepted=struct.unpack(f"<{len(accepted) // 4}I", accepted),
        plan=plan,
        frame=frame,
    )


def plan_bytes_of(content: RecordDict) -> int:
    """Bytes of a request that are the plan's; 0 of anything else."""
    try:
        payload = from_record(content)
    except FrameError:
        return 0
    if payload[: len(_MAGIC)] != _MAGIC:
        return 0
    return int(_HEADER.unpack_from(payload)[5])


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
    except (KeyError, AttributeError, TypeError):
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


def single_client_bytes(payload: bytes, *, reply: bool) -> int:
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
