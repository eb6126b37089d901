"""Frames: what was packed is what is read, and whatever is wrong is refused (law 7)."""

from __future__ import annotations

import math
import struct
from dataclasses import replace

import numpy as np
import pytest
from frame_mutations import forge
from hypothesis import given
from hypothesis import strategies as st
from vectors import PLAIN_CODECS

from fedpet.errors import ConfigError, FrameError
from fedpet.protocol.frame import (
    HEADER_BYTES,
    MAX_LOSS,
    MAX_SECONDS,
    Frame,
    Refusal,
    RefusalCode,
    pack_frame,
    pack_refusal,
    unpack_frames,
)

DIGEST = bytes(range(16))
FRAME = Frame(DIGEST, 3, 0xFEEDFACE, "eden-4", 54_321, 120, 0.6931, 12.5, b"payload")


def unpack(buffer, max_frames=8, max_payload_bytes=10_000):
    return list(unpack_frames(buffer, max_frames=max_frames, max_payload_bytes=max_payload_bytes))


# ---------------------------------------------------------------- what is read


@given(
    frame=st.builds(
        Frame,
        plan_digest=st.binary(min_size=16, max_size=16),
        server_round=st.integers(0, 2**32 - 1),
        client=st.integers(0, 2**64 - 1),
        codec=st.sampled_from((*PLAIN_CODECS, "topk-0.1+eden-4", "topk-0.000001+int8-raw")),
        count=st.integers(0, 2**32 - 1),
        num_examples=st.integers(0, 2**32 - 1),
        loss=st.floats(-MAX_LOSS, MAX_LOSS),
        train_seconds=st.floats(0, MAX_SECONDS),
        payload=st.binary(max_size=300),
    )
)
def test_a_frame_comes_back_as_it_was(frame):
    packed = pack_frame(frame)
    assert len(packed) == HEADER_BYTES + len(frame.payload)
    assert unpack(packed) == [frame]


@given(reason=st.text(max_size=700), client=st.integers(0, 2**64 - 1))
def test_a_refusal_says_its_reason_in_500_bytes(reason, client):
    (refusal,) = unpack(pack_refusal(Refusal(DIGEST, 7, client, reason)))
    assert isinstance(refusal, Refusal)
    assert (refusal.plan_digest, refusal.server_round, refusal.client) == (DIGEST, 7, client)
    assert len(refusal.reason.encode()) <= 500
    said = reason.encode("utf-8", "replace").decode()
    assert said.startswith(refusal.reason)
    assert refusal.reason == said or len(refusal.reason.encode()) > 496


def test_a_reply_holds_a_frame_a_client_in_order():
    frames = [replace(FRAME, client=client, payload=bytes(client)) for client in range(5)]
    refusal = Refusal(DIGEST, 3, 99, "no rows")
    packed = b"".join(map(pack_frame, frames)) + pack_refusal(refusal)
    assert unpack(packed) == [*frames, refusal]
    assert unpack(np.frombuffer(packed, dtype=np.uint8)) == [*frames, refusal]
    assert unpack(b"") == []


def test_a_header_takes_68_bytes():
    assert len(pack_frame(replace(FRAME, payload=b""))) == 68


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"version": 1}, "version 1: run one version"),
        ({"version": 3}, "version 3: run one version"),
        ({"kind": 0}, "kind 0"),
        ({"kind": 3}, "evaluation of client 00000000feedface is cut short"),
        ({"kind": 5}, "kind 5"),
        ({"codec": 0}, "0x00000000"),
        ({"codec": 0xFFFFFFFF}, "0xffffffff"),
        ({"length": 2**32 - 1}, "may have a payload of 10000 bytes, it announces 4294967295"),
        ({"length": 8}, "announces 8 bytes of payload, 7 are left: it is cut short"),
        ({"loss": math.nan}, "finite loss"),
        ({"loss": math.inf}, "finite loss"),
        ({"seconds": math.nan}, "finite loss and time"),
        ({"seconds": -1.0}, "finite loss and time"),
        ({"loss": 1e39}, "finite loss and time"),
        ({"seconds": 1.1e9}, "finite loss and time, up to"),
    ],
)
def test_a_forged_header_is_refused_for_what_is_wrong_with_it(fields, says):
    with pytest.raises(FrameError, match=says):
        unpack(forge(pack_frame(FRAME), **fields))


def test_every_flipped_bit_is_found():
    packed = pack_frame(FRAME)
    for bit in range(8 * len(packed)):
        flipped = bytearray(packed)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FrameError):
            unpack(flipped)


def test_every_cut_and_every_longer_frame_is_refused():
    packed = pack_frame(FRAME)
    for end in range(1, len(packed)):
        with pytest.raises(FrameError):
            unpack(packed[:end])
    with pytest.raises(FrameError):
        unpack(packed + b"\0")


def test_more_frames_than_asked_for_are_refused():
    with pytest.raises(FrameError, match="may hold 2 frames: 75 bytes follow the last"):
        unpack(pack_frame(FRAME) * 3, max_frames=2)


def test_a_refusal_that_carries_numbers_or_no_text_is_refused():
    packed = pack_refusal(Refusal(DIGEST, 7, 1, "no rows"))
    with pytest.raises(FrameError, match="at 0"):
        unpack(forge(packed, examples=5))
    with pytest.raises(FrameError, match="UTF-8"):
        unpack(forge(packed[:-1] + b"\xff"))
    long = pack_frame(replace(FRAME, codec="float32", payload=bytes(510)))
    with pytest.raises(FrameError, match="payload of 509 bytes"):
        unpack(forge(long, kind=2, codec=0, count=0, examples=0, loss=0.0, seconds=0.0))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("plan_digest", b"short"),
        ("server_round", -1),
        ("server_round", 2**32),
        ("client", 2**64),
        ("count", 2**32),
        ("loss", math.nan),
        ("train_seconds", math.inf),
        ("train_seconds", -1.0),
        ("train_seconds", 1e308),
        ("loss", -1e39),
    ],
)
def test_a_frame_that_would_be_refused_is_not_packed(field, value):
    with pytest.raises(ValueError, match=r"must be finite|take|digest"):
        pack_frame(replace(FRAME, **{field: value}))


def test_a_frame_of_an_unknown_codec_is_not_packed():
    with pytest.raises(ConfigError, match="unknown codec 'int2'"):
        pack_frame(replace(FRAME, codec="int2"))


# ---------------------------------------------------------------- the codes of refusals


@given(
    code=st.integers(0, 255),
    density=st.floats(0, 1, exclude_min=True),
    reason=st.text(max_size=120),
)
def test_a_refusal_comes_back_with_its_code_and_the_density_of_another_tier(code, density, reason):
    density = density if code == RefusalCode.OTHER_TIER else 0.0
    sent = Refusal(DIGEST, 7, 1, reason, code, density)
    packed = pack_refusal(sent)
    assert unpack(packed) == [sent]
    assert len(packed) == sent.num_bytes == HEADER_BYTES + 9 + len(reason.encode())


def test_a_code_that_this_version_does_not_know_is_told_as_such():
    (refusal,) = unpack(pack_refusal(Refusal(DIGEST, 7, 1, "out of battery", 77)))
    assert refusal.text == ("refusal code 77, unknown to this version of fedpet: out of battery")
    assert Refusal(DIGEST, 7, 1, "no rows").text == "no rows"


@pytest.mark.parametrize(
    ("code", "density"),
    [(4, 0.0), (4, math.nan), (4, 1.5), (4, -0.1), (0, 0.5), (1, math.nan), (3, 1e-9)],
)
def test_a_density_without_its_code_or_out_of_range_is_refused_and_not_packed(code, density):
    packed = bytearray(pack_refusal(Refusal(DIGEST, 7, 1, "no rows")))
    packed[68:77] = struct.pack("<Bd", code, density)
    with pytest.raises(FrameError, match="a density in"):
        unpack(forge(packed))
    with pytest.raises(ValueError, match="a density in"):
        pack_refusal(Refusal(DIGEST, 7, 1, "no rows", code, density))


@pytest.mark.parametrize("code", [-1, 256])
def test_a_code_takes_a_byte(code):
    with pytest.raises(ValueError, match="a code of a byte"):
        pack_refusal(Refusal(DIGEST, 7, 1, "", code))


def test_a_refusal_that_ends_within_its_code_is_refused():
    packed = pack_refusal(Refusal(DIGEST, 7, 1, ""))
    for length in range(9):
        with pytest.raises(FrameError, match="cut short before its reason"):
            unpack(forge(packed[: 68 + length], length=length))
