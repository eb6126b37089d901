"""Frames: what was packed is what is read, and whatever is wrong is refused (law 7)."""

from __future__ import annotations

import contextlib
import math
import random
import struct
import time
import tracemalloc
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpet.codec import (
    Coding,
    Frame,
    Refusal,
    known_codecs,
    pack_frame,
    pack_refusal,
    unpack_frames,
)
from fedpet.codec.frame import HEADER_BYTES
from fedpet.errors import ConfigError, FrameError

DIGEST = bytes(range(16))
FRAME = Frame(DIGEST, 3, 0xFEEDFACE, "eden-4", 54_321, 120, 0.6931, 12.5, b"payload")

# Where the header's fields stand; see fedpet/codec/frame.py.
FIELDS = {
    "version": (2, "<B"),
    "kind": (3, "<B"),
    "digest": (4, "<16s"),
    "round": (20, "<I"),
    "client": (24, "<Q"),
    "codec": (32, "<I"),
    "count": (36, "<I"),
    "examples": (40, "<I"),
    "loss": (44, "<d"),
    "seconds": (52, "<d"),
    "length": (60, "<I"),
}


def unpack(buffer, max_frames=8, max_payload_bytes=10_000):
    return list(unpack_frames(buffer, max_frames=max_frames, max_payload_bytes=max_payload_bytes))


def forge(packed, **fields):
    """Change fields of a frame, and make its checksum right again: an adversary can do that too."""
    forged = bytearray(packed)
    for name, value in fields.items():
        offset, form = FIELDS[name]
        struct.pack_into(form, forged, offset, value)
    struct.pack_into("<I", forged, 64, zlib.crc32(forged[68:], zlib.crc32(forged[:64])))
    return bytes(forged)


# ---------------------------------------------------------------- what is read


@settings(deadline=None)
@given(
    frame=st.builds(
        Frame,
        plan_digest=st.binary(min_size=16, max_size=16),
        server_round=st.integers(0, 2**32 - 1),
        client=st.integers(0, 2**64 - 1),
        codec=st.sampled_from((*known_codecs(), "topk-0.1+eden-4", "topk-0.000001+int8-raw")),
        count=st.integers(0, 2**32 - 1),
        num_examples=st.integers(0, 2**32 - 1),
        loss=st.floats(allow_nan=False, allow_infinity=False),
        train_seconds=st.floats(0, allow_nan=False, allow_infinity=False),
        payload=st.binary(max_size=300),
    )
)
def test_a_frame_comes_back_as_it_was(frame):
    packed = pack_frame(frame)
    assert len(packed) == HEADER_BYTES + len(frame.payload)
    assert unpack(packed) == [frame]


@settings(deadline=None)
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
        ({"version": 2}, "version 2: run one version"),
        ({"kind": 0}, "kind 0"),
        ({"kind": 3}, "kind 3"),
        ({"codec": 0}, "0x00000000"),
        ({"codec": 0xFFFFFFFF}, "0xffffffff"),
        ({"length": 2**32 - 1}, "may have a payload of 10000 bytes, it announces 4294967295"),
        ({"length": 8}, "announces 8 bytes of payload, 7 are left: it is cut short"),
        ({"loss": math.nan}, "finite loss"),
        ({"loss": math.inf}, "finite loss"),
        ({"seconds": math.nan}, "finite loss and time"),
        ({"seconds": -1.0}, "finite loss and time"),
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
    long = pack_frame(replace(FRAME, codec="float32", payload=bytes(501)))
    with pytest.raises(FrameError, match="payload of 500 bytes"):
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
    ],
)
def test_a_frame_that_would_be_refused_is_not_packed(field, value):
    with pytest.raises(ValueError, match=r"must be finite|take|digest"):
        pack_frame(replace(FRAME, **{field: value}))


def test_a_frame_of_an_unknown_codec_is_not_packed():
    with pytest.raises(ConfigError, match="unknown codec 'int2'"):
        pack_frame(replace(FRAME, codec="int2"))


# ---------------------------------------------------------------- a head of its own codec


def test_a_head_s_payload_is_cut_and_lengthened_in_vain():
    coding = Coding.of([(0, 40), (40, 60)], [(40, 60)], codec="float32-raw", head_codec="int8-raw")
    values = np.random.default_rng(0).standard_normal(60).astype(np.float32)
    payload = coding.encode(values, seed=1)
    decoded = coding.decode(payload, seed=1)
    assert (decoded[:40] == values[:40]).all()
    assert 0 < np.abs(decoded[40:] - values[40:]).max() < 0.05
    assert len(payload) == coding.max_payload_bytes
    for wrong in (*(payload[:end] for end in range(len(payload))), payload + b"\0"):
        with pytest.raises(FrameError):
            coding.decode(wrong, seed=1)
    for length in (b"\0", b"\xff\xff\xff\x0f", b"\xff" * 9, b"\x80\x00"):
        with pytest.raises(FrameError):
            coding.decode(length + payload[2:], seed=1)


def test_a_head_s_codec_that_is_the_others_changes_no_byte():
    values = np.random.default_rng(0).standard_normal(180).astype(np.float32)
    groups = [(0, 150), (150, 180)]
    alone = Coding.of(groups, codec="eden-4").encode(values, seed=3)
    for head in ("", "eden-4"):
        same = Coding.of(groups, groups[1:], codec="eden-4", head_codec=head)
        assert same.encode(values, seed=3) == alone
    nothing = Coding.of([(0, 180)], [(0, 180)], codec="eden-4", head_codec="int8")
    assert nothing.decode(nothing.encode(values, seed=3), seed=3) == pytest.approx(values, abs=0.05)


# ---------------------------------------------------------------- adversaries

GROUPS = [(0, 150), (150, 180)]
COUNT = 180
ROUND = 4
CODECS = ("float32", "bfloat16", "int8", "int4", "eden-1", "eden-4", "eden-8", "topk-0.1+eden-4")
HEADS = (("eden-4", "int8"), ("topk-0.1+eden-2", "float32"), ("float32", "topk-0.5+int4-raw"))
CODINGS = (
    *(Coding.of(GROUPS, codec=codec) for codec in CODECS),
    *(Coding.of(GROUPS, GROUPS[1:], codec=codec, head_codec=head) for codec, head in HEADS),
)


def receive(buffer, coding):
    """What a server does with a reply: the frames that pass every check, or a `FrameError`."""
    accepted = []
    most = coding.max_payload_bytes
    for frame in unpack_frames(buffer, max_frames=3, max_payload_bytes=most):
        if (frame.plan_digest, frame.server_round) != (DIGEST, ROUND):
            raise FrameError("another plan or round")
        if isinstance(frame, Refusal):
            continue
        if (frame.codec, frame.count) != (coding.codec, COUNT):
            raise FrameError("another codec or length")
        values = coding.decode(frame.payload, seed=ROUND)
        accepted.append((frame, values))
    return accepted


def honest_reply(coding, rng):
    packed = []
    for client in range(rng.randint(1, 3)):
        values = np.random.default_rng(rng.getrandbits(32)).standard_normal(COUNT)
        payload = coding.encode(values, seed=ROUND)
        assert len(payload) <= coding.max_payload_bytes
        frame = Frame(DIGEST, ROUND, client, coding.codec, COUNT, 10, 0.5, 1.0, payload)
        packed.append(pack_frame(frame))
    return packed


def attack(frames, rng):
    """Damage or forge a reply: flips, cuts, extensions, reorderings, forged fields and payloads."""
    forged = list(frames)
    for _ in range(rng.randint(1, 3)):
        which = rng.randrange(len(forged))
        frame = bytearray(forged[which])
        kind = rng.randrange(10) if frame else 9
        if kind == 0:  # flipped bits
            for _ in range(rng.randint(1, 8)):
                frame[rng.randrange(len(frame))] ^= 1 << rng.randrange(8)
        elif kind == 1:  # cut
            del frame[rng.randrange(len(frame)) :]
        elif kind == 2:  # extended
            frame += rng.randbytes(rng.randint(1, 100))
        elif kind == 3:  # parts of it reordered
            a, b = sorted((rng.randrange(len(frame)), rng.randrange(len(frame))))
            frame = frame[b:] + frame[a:b] + frame[:a]
        elif kind == 4 and len(frame) >= 68:  # a forged field under a right checksum
            name = rng.choice(list(FIELDS))
            form = FIELDS[name][1]
            wild = [0, 1, 2**31, 2**32 - 1, 2**60, 2**64 - 1, rng.getrandbits(64)]
            if form == "<d":
                value = rng.choice([math.nan, math.inf, -math.inf, -1.0, 1e308])
            elif form == "<16s":
                value = rng.randbytes(16)
            else:
                value = rng.choice(wild) % (1 << 8 * struct.calcsize(form))
            frame = bytearray(forge(frame, **{name: value}))
        elif kind == 5 and len(frame) > 68:  # a forged payload under a right checksum
            for _ in range(rng.randint(1, 6)):
                frame[rng.randrange(68, len(frame))] = rng.choice([0, 1, 2, 0x7F, 0x80, 0xFF])
            frame = bytearray(forge(frame))
        elif kind == 6 and len(frame) >= 68:  # a payload of another length, announced rightly
            payload = rng.randbytes(rng.randint(0, 300))
            frame = bytearray(forge(bytes(frame[:68]) + payload, length=len(payload)))
        elif kind == 7 and len(frame) > 68:  # NaN and infinity all over
            at = rng.randrange(68, len(frame))
            frame[at : at + 64] = rng.choice([b"\xff", b"\x7f\xc0", b"\x00\x00\x80\x7f"]) * 16
            frame = bytearray(forge(frame, length=len(frame) - 68))
        elif kind == 8:  # numbers of any length
            at = rng.randrange(len(frame) + 1)
            frame[at:at] = b"\xff" * rng.randint(1, 12)
        else:  # noise
            frame = bytearray(rng.randbytes(rng.randint(0, 200)))
        forged[which] = bytes(frame)
        if rng.random() < 0.3:
            rng.shuffle(forged)
        if rng.random() < 0.1:
            forged.append(rng.choice(forged))
    return b"".join(forged)


def besiege(num_replies, seed):
    """Attack that many times; return how many frames were accepted, after checking each."""
    rng = random.Random(seed)
    accepted = refused = 0
    honest = {coding: [honest_reply(coding, rng) for _ in range(8)] for coding in CODINGS}
    for _ in range(num_replies):
        coding = rng.choice(CODINGS)
        reply = attack(rng.choice(honest[coding]), rng)
        try:
            frames = receive(reply, coding)
        except FrameError:
            refused += 1
            continue
        for frame, values in frames:
            accepted += 1
            assert (frame.plan_digest, frame.server_round) == (DIGEST, ROUND)
            assert (frame.codec, frame.count) == (coding.codec, COUNT)
            assert math.isfinite(frame.loss)
            assert values.shape == (COUNT,)
            assert np.isfinite(values).all()
            # What was accepted is whole: it is in the reply as it would be packed.
            assert pack_frame(frame) in reply
    assert refused > num_replies // 2  # an attack is no harmless noise
    return accepted


def test_no_attack_passes_a_wrong_frame():
    besiege(1500, seed=0)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**64))
def test_no_drawn_attack_passes_a_wrong_frame(seed):
    rng = random.Random(seed)
    coding = rng.choice(CODINGS)
    try:
        frames = receive(attack(honest_reply(coding, rng), rng), coding)
    except FrameError:
        return
    assert all(np.isfinite(values).all() for _, values in frames)


@pytest.mark.slow
def test_100_000_attacks_pass_no_wrong_frame_without_a_crash_or_a_pause():
    # .venv/bin/python -m pytest -m slow tests/test_frame.py
    slowest = 0.0
    for seed in range(100):
        start = time.process_time()
        besiege(1000, seed=seed)
        slowest = max(slowest, time.process_time() - start)
    assert slowest < 60  # for a thousand


def test_a_refused_reply_costs_no_more_memory_than_its_plan_allows():
    # A float takes at most 40 bytes while it is decoded, and a reply at most itself once more.
    rng = random.Random(0)
    honest = {coding: honest_reply(coding, rng) for coding in CODINGS}
    for coding in CODINGS:
        receive(b"".join(honest[coding]), coding)  # load what is loaded once
    replies = [(coding, attack(honest[coding], rng)) for coding in CODINGS for _ in range(50)]
    tracemalloc.start()
    try:
        for coding, reply in replies:
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            with contextlib.suppress(FrameError):
                receive(reply, coding)
            peak = tracemalloc.get_traced_memory()[1] - before
            assert peak < 40 * COUNT * 3 + len(reply) + 30_000, coding
    finally:
        tracemalloc.stop()
