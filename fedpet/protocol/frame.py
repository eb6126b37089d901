"""Pack and read frames: one client's values around a codec's payload, or its refusal to send any.

The header, little-endian, 68 bytes:

    magic "FP", version, kind               2 + 1 + 1
    plan digest                            16          the first half of its SHA-256
    round, client                           4 + 8      client 0 is the server
    codec, count                            4 + 4
    examples, loss, train seconds           4 + 8 + 8
    payload length                          4
    CRC-32 of all before and the payload    4

The payload of a refusal: a code (1), a density (8, a double, 0 but for OTHER_TIER), the reason in
UTF-8, at most 500 bytes. A server acts on the code alone; the reason is for people.

A client that also measures has a section with its metric before its payload, and the length counts
both (fedpet/protocol/client_metric.py). One that was asked to measure alone sends nothing but the
section: codec, count, examples, loss and train seconds are 0.

A header is read, and everything in it held against a bound, before anything is allocated. The
checksum finds damage on the way; it proves no honesty, so the values are checked again when they
are decoded, and the digest, round and client by the reader that knows which ones are due.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum, unique
from typing import Any

from fedpet.codec.spec import codec_from_number, parse_codec
from fedpet.errors import FrameError, PlanError
from fedpet.protocol.client_metric import (
    MAX_SECONDS,
    SECTION_BYTES,
    ClientMetric,
    pack_section,
    read_section,
)

__all__ = [
    "DIGEST_BYTES",
    "HEADER_BYTES",
    "MAX_LOSS",
    "MAX_SECONDS",
    "Frame",
    "Measured",
    "Refusal",
    "RefusalCode",
    "StateMissingError",
    "pack_frame",
    "pack_measured",
    "pack_refusal",
    "unpack_frames",
]

VERSION = 2
HEADER_BYTES = 68
MAX_REASON_BYTES = 500
DIGEST_BYTES = 16
# Bounds that keep sums and means over clients finite: the largest float32, 30 years (MAX_SECONDS).
MAX_LOSS = 3.4028234663852886e38

_MAGIC = b"FP"
_VALUES, _REFUSAL, _WITH_SECTION, _SECTION_ALONE = 1, 2, 3, 4
_HEAD = struct.Struct("<2sBB16sIQIIIddI")
_CHECKSUM = struct.Struct("<I")
_REFUSAL_HEAD = struct.Struct("<Bd")


@unique
class RefusalCode(IntEnum):
    """Reasons for sending no values, as far as a server acts on them."""

    OTHER = 0
    PLAN_MISSING = 1
    REFERENCE_MISSING = 2
    RESIDUAL_MISSING = 3
    OTHER_TIER = 4
    VALUES_MISSING = 5
    NODE_UNFIT = 6  # the node cannot take part at all: its checkpoint, its rows, its disk
    ROWS_CHANGED = 7  # of no client: the node's rows are others than it registered


_KNOWN = frozenset(RefusalCode)
_MISSING = {
    RefusalCode.PLAN_MISSING: "plan",
    RefusalCode.REFERENCE_MISSING: "reference that the changes are of",
    RefusalCode.RESIDUAL_MISSING: "residual of the client's last accepted round",
    RefusalCode.VALUES_MISSING: "values that the message names",
}


class StateMissingError(PlanError):
    """Something is missing on a node that the server can send again or do without.

    Attributes:
        code: Of the refusal that says so.
    """

    def __init__(self, code: RefusalCode) -> None:
        super().__init__(f"this node does not hold the {_MISSING[code]}")
        self.code = code


@dataclass(frozen=True)
class Frame:
    """One client's values, or the server's.

    Attributes:
        plan_digest: The first 16 bytes of the plan's SHA-256.
        server_round: Counted from 1.
        client: 64 bits that name the client; 0 is the server.
        codec: Name of the payload's codec.
        count: Number of values that the payload decodes to.
        num_examples: Rows the client trained on.
        loss: Mean training loss, at most a float32's largest in magnitude.
        train_seconds: Time the client trained, at most 1e9.
        payload: The bytes of `encode_values`; a view of the buffer where it was read as one.
        metric: On the client's own rows, where the plan asks for it and the client holds some out.
    """

    plan_digest: bytes
    server_round: int
    client: int
    codec: str
    count: int
    num_examples: int
    loss: float
    train_seconds: float
    payload: bytes | memoryview
    metric: ClientMetric | None = None

    @property
    def num_bytes(self) -> int:
        """Length of the packed frame."""
        section = 0 if self.metric is None else SECTION_BYTES
        return HEADER_BYTES + section + len(self.payload)


@dataclass(frozen=True)
class Measured:
    """One client's metric, of values that it was sent to measure alone.

    Attributes:
        plan_digest: As in a frame, like round and client.
        server_round: The round that would begin from these values.
        client: 64 bits that name the client.
        metric: On its own rows.
    """

    plan_digest: bytes
    server_round: int
    client: int
    metric: ClientMetric

    @property
    def num_bytes(self) -> int:
        """Length of the packed answer."""
        return HEADER_BYTES + SECTION_BYTES


@dataclass(frozen=True)
class Refusal:
    """A client's reason for sending no values.

    Attributes:
        plan_digest: As in a frame, like round and client.
        server_round: Counted from 1.
        client: 64 bits that name the client.
        reason: For people; cut to 500 bytes of UTF-8 when it is packed.
        code: A `RefusalCode`, or a number that a newer node sent.
        density: Of OTHER_TIER the density that the node trains, in (0, 1]; else 0.
    """

    plan_digest: bytes
    server_round: int
    client: int
    reason: str
    code: int = RefusalCode.OTHER
    density: float = 0.0

    @property
    def num_bytes(self) -> int:
        """Length of the packed refusal, where the reason is not too long."""
        return HEADER_BYTES + _REFUSAL_HEAD.size + len(self.reason.encode())

    @property
    def text(self) -> str:
        """The reason, with an unknown code named."""
        if self.code in _KNOWN:
            return self.reason
        return f"refusal code {self.code}, unknown to this version of fedpet: {self.reason}"


def pack_frame(frame: Frame) -> bytes:
    """Write a frame.

    Raises:
        ConfigError: There is no such codec.
        ValueError: A number does not fit its field, or is not finite.
    """
    section = b"" if frame.metric is None else pack_section(frame.metric)
    return _pack(
        _WITH_SECTION if section else _VALUES,
        frame.plan_digest,
        frame.server_round,
        frame.client,
        parse_codec(frame.codec).number,
        frame.count,
        frame.num_examples,
        frame.loss,
        frame.train_seconds,
        b"".join((section, frame.payload)) if section else frame.payload,
    )


def pack_measured(measured: Measured) -> bytes:
    """Write a client's metric alone."""
    return _pack(
        _SECTION_ALONE,
        measured.plan_digest,
        measured.server_round,
        measured.client,
        *(0, 0, 0, 0.0, 0.0),
        pack_section(measured.metric),
    )


def pack_refusal(refusal: Refusal) -> bytes:
    """Write a refusal. A longer reason is cut to 500 bytes, at a whole character.

    Raises:
        ValueError: The code is no byte, or the density no density.
    """
    if not _fits(refusal.code, refusal.density):
        raise ValueError(
            f"a refusal has a code of a byte, and a density in (0, 1] with OTHER_TIER alone, got "
            f"{refusal.code} and {refusal.density!r}."
        )
    reason = refusal.reason.encode("utf-8", "replace")[:MAX_REASON_BYTES]
    reason = reason.decode("utf-8", "ignore").encode("utf-8")
    return _pack(
        _REFUSAL,
        refusal.plan_digest,
        refusal.server_round,
        refusal.client,
        *(0, 0, 0, 0.0, 0.0),
        _REFUSAL_HEAD.pack(refusal.code, refusal.density) + reason,
    )


def unpack_frames(
    buffer: Any, *, max_frames: int, max_payload_bytes: int, views: bool = False
) -> Iterator[Frame | Measured | Refusal]:
    """Read frames one after the other, each checked before the next is read.

    Args:
        buffer: Bytes, or anything with their buffer: a uint8 array, a memoryview.
        max_frames: The largest number of frames.
        max_payload_bytes: The longest payload, a section not counted. No more than the buffer's
            size is copied.
        views: Leave payloads where they are, as views that keep the buffer alive.

    Yields:
        Each frame in order. A wrong one raises after the right ones before it.

    Raises:
        FrameError: The bytes are anything but at most `max_frames` whole frames.
    """
    view = memoryview(buffer).cast("B")
    offset = number = 0
    while offset < len(view):
        if number >= max_frames:
            raise FrameError(
                f"a reply may hold {max_frames} frames: {len(view) - offset} bytes follow the last."
            )
        frame, size = _unpack(view[offset:], max_payload_bytes, views)
        yield frame
        offset += size
        number += 1


def _pack(
    kind: int,
    digest: bytes,
    server_round: int,
    client: int,
    codec: int,
    count: int,
    num_examples: int,
    loss: float,
    train_seconds: float,
    payload: bytes | memoryview,
) -> bytes:
    if len(digest) != DIGEST_BYTES:
        raise ValueError(f"a plan's digest takes {DIGEST_BYTES} bytes, got {len(digest)}.")
    if not _is_reportable(loss, train_seconds):
        raise ValueError(
            f"a frame's loss and time must be finite, up to {MAX_LOSS:g} and {MAX_SECONDS:g} "
            f"seconds, got {loss!r} and {train_seconds!r}. Where training went wrong, send a "
            "refusal."
        )
    numbers = (server_round, client, codec, count, num_examples, loss, train_seconds, len(payload))
    try:
        head = _HEAD.pack(_MAGIC, VERSION, kind, digest, *numbers)
    except struct.error as error:
        raise ValueError(
            f"a frame's round, count, examples and payload length take 32 bits and its client 64, "
            f"got round {server_round}, count {count}, {num_examples} examples, {len(payload)} "
            f"bytes, client {client}: {error}."
        ) from None
    return b"".join((head, _CHECKSUM.pack(zlib.crc32(payload, zlib.crc32(head))), payload))


def _unpack(
    view: memoryview, max_payload_bytes: int, views: bool
) -> tuple[Frame | Measured | Refusal, int]:
    if len(view) < HEADER_BYTES:
        raise FrameError(f"a frame has {HEADER_BYTES} bytes of header, {len(view)} are left.")
    magic, version, kind, digest, server_round, client, *numbers = _HEAD.unpack_from(view)
    codec, count, num_examples, loss, train_seconds, payload_bytes = numbers
    if magic != _MAGIC:
        raise FrameError(f"a frame opens with {_MAGIC!r}, got {bytes(magic)!r}.")
    if version != VERSION:
        raise FrameError(
            f"frames here are of version {VERSION}, got version {version}: run one version of "
            "fedpet on all nodes."
        )
    bounds = {
        _VALUES: max_payload_bytes,
        _REFUSAL: _REFUSAL_HEAD.size + MAX_REASON_BYTES,
        _WITH_SECTION: max_payload_bytes + SECTION_BYTES,
        _SECTION_ALONE: SECTION_BYTES,
    }
    if kind not in bounds:
        raise FrameError(
            f"a frame holds values (1), a refusal (2), values with a metric (3) or a metric (4), "
            f"got kind {kind}."
        )
    bound = bounds[kind]
    if payload_bytes > bound:
        raise FrameError(
            f"the frame of client {client:016x} may have a payload of {bound} bytes, it announces "
            f"{payload_bytes}."
        )
    if payload_bytes > len(view) - HEADER_BYTES:
        raise FrameError(
            f"the frame of client {client:016x} announces {payload_bytes} bytes of payload, "
            f"{len(view) - HEADER_BYTES} are left: it is cut short."
        )
    payload = view[HEADER_BYTES : HEADER_BYTES + payload_bytes]
    (expected,) = _CHECKSUM.unpack_from(view, _HEAD.size)
    checksum = zlib.crc32(payload, zlib.crc32(view[: _HEAD.size]))
    if checksum != expected:
        raise FrameError(
            f"the checksum of the frame of client {client:016x} must be {checksum:08x}, it is "
            f"{expected:08x}: it was damaged on the way."
        )
    if not _is_reportable(loss, train_seconds):
        raise FrameError(
            f"the frame of client {client:016x} must have a finite loss and time, up to "
            f"{MAX_LOSS:g} and {MAX_SECONDS:g} seconds, got {loss!r} and {train_seconds!r}."
        )
    size = HEADER_BYTES + payload_bytes
    if kind == _REFUSAL:
        return _refusal(digest, server_round, client, numbers[:5], payload), size
    metric = None
    if kind != _VALUES:
        if payload_bytes < SECTION_BYTES:
            raise FrameError(f"the evaluation of client {client:016x} is cut short.")
        metric = read_section(payload, client)
        payload = payload[SECTION_BYTES:]
    if kind == _SECTION_ALONE:
        assert metric is not None
        _check_unused("evaluation", client, numbers[:5])
        return Measured(digest, server_round, client, metric), size
    name = codec_from_number(codec).name
    frame = Frame(
        digest,
        server_round,
        client,
        name,
        count,
        num_examples,
        loss,
        train_seconds,
        payload if views else bytes(payload),
        metric,
    )
    return frame, size


def _is_reportable(loss: float, train_seconds: float) -> bool:
    return abs(loss) <= MAX_LOSS and 0 <= train_seconds <= MAX_SECONDS  # no NaN passes


def _refusal(
    digest: bytes, server_round: int, client: int, unused: list[float], payload: memoryview
) -> Refusal:
    _check_unused("refusal", client, unused)
    if len(payload) < _REFUSAL_HEAD.size:
        raise FrameError(f"the refusal of client {client:016x} is cut short before its reason.")
    code, density = _REFUSAL_HEAD.unpack_from(payload)
    if not _fits(code, density):
        raise FrameError(
            f"the refusal of client {client:016x} may name a density in (0, 1] with the code of "
            f"another tier alone, got {density!r} with code {code}."
        )
    try:
        reason = bytes(payload[_REFUSAL_HEAD.size :]).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FrameError(
            f"the refusal of client {client:016x} must be UTF-8: {error.reason}."
        ) from None
    return Refusal(digest, server_round, client, reason, code, density)


def _check_unused(kind: str, client: int, unused: list[float]) -> None:
    if any(unused):
        raise FrameError(
            f"the {kind} of client {client:016x} must leave codec, count, examples, loss and time "
            f"at 0, got {unused}."
        )


def _fits(code: int, density: float) -> bool:
    if code == RefusalCode.OTHER_TIER:
        return 0 < density <= 1  # no NaN passes
    return density == 0 if code in _KNOWN else 0 <= code <= 255
