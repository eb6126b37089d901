"""Frames: what was packed is what is read, and whatever is wrong is refused (law 7)."""

from __future__ import annotations

import contextlib
import math
import random
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import dry
import numpy as np
import pytest
from forgery import attack, forge
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
from fedpet.codec.frame import HEADER_BYTES, MAX_LOSS, MAX_SECONDS
from fedpet.config import CodecConfig
from fedpet.errors import ConfigError, FrameError, PlanError
from fedpet.messages import Path, Request, read_request, write_request
from fedpet.model import Segment
from fedpet.plan import Plan
from fedpet.reference import Reference, encode_whole, seed_of_round
from fedpet.starts import Start, frames_of, starts_of

DIGEST = bytes(range(16))
FRAME = Frame(DIGEST, 3, 0xFEEDFACE, "eden-4", 54_321, 120, 0.6931, 12.5, b"payload")


def unpack(buffer, max_frames=8, max_payload_bytes=10_000):
    return list(unpack_frames(buffer, max_frames=max_frames, max_payload_bytes=max_payload_bytes))


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
        loss=st.floats(-MAX_LOSS, MAX_LOSS),
        train_seconds=st.floats(0, MAX_SECONDS),
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


def besiege_server(num_replies, seed):
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
    besiege_server(1500, seed=0)


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


# ---------------------------------------------------------------- adversaries of a node

LAYOUT = [Segment("mask", "w", 0, 150), Segment("head", "h", 150, 30)]
FIRST = 2  # the round whose reference the node holds
NODE_CODECS = (
    CodecConfig(down="eden-4"),
    CodecConfig(down="int8", head_down="bfloat16"),
    CodecConfig(down="topk-0.1+eden-2", head_down="float32"),
    CodecConfig(down="bfloat16", downlink="values"),
    CodecConfig(down="eden-1", head_down="int4-raw", downlink="values"),
    CodecConfig(down="float32"),
)


class Held:
    """What a node holds of a run: one reference in memory, and none on disk."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference

    def reference_in_memory(self, tier: int) -> Reference:
        return self._reference

    def reference_on_disk(self, tier: int, count: int) -> None: ...
    def keep_reference(self, tier: int, reference: Reference) -> None: ...


class Siege:
    """A node under one plan, honest requests to it, and what they lead to."""

    def __init__(self, codec: CodecConfig, rng: random.Random) -> None:
        self.plan: Plan = dry.make_plan(codec=codec, num_values=COUNT)
        self.pet: Any = SimpleNamespace(tiers=[LAYOUT])
        random_values = np.random.default_rng(rng.getrandbits(32))
        held = random_values.standard_normal(COUNT).astype(np.float32)
        self.held: Any = Held(Reference(FIRST, held))
        self.values = held
        self.frames: list[list[bytes]] = []  # ways to the reference of the round, or its values
        coding = self.plan.downlink(GROUPS, GROUPS[1:])
        if not self.plan.sends_changes:
            seed = seed_of_round(self.plan.seed, ROUND)
            payload = coding.encode(random_values.standard_normal(COUNT), seed=seed)
            self.values = coding.decode(payload, seed=seed)
            self.frames.append([self._pack(ROUND, coding.codec, payload)])
            return
        changes = []
        reference = Reference(FIRST, held)
        for server_round in range(FIRST + 1, ROUND + 1):
            seed = seed_of_round(self.plan.seed, server_round)
            payload = coding.encode(0.1 * random_values.standard_normal(COUNT), seed=seed)
            changes.append(self._pack(server_round, coding.codec, payload))
            reference = reference.moved(coding.decode(payload, seed=seed))
        self.values = reference.values
        self.frames.append(changes)
        self.frames.append([self._pack(ROUND, "float32", encode_whole(reference))])

    def _pack(self, server_round: int, codec: str, payload: bytes) -> bytes:
        return pack_frame(Frame(DIGEST, server_round, 0, codec, COUNT, 0, 0.0, 0.0, payload))

    def request(self, way: int, forge: Callable[[list[bytes]], bytes] = b"".join) -> Request:
        """An honest request but for what `forge` makes of its frames."""
        frames = self.frames[way]
        if not self.plan.sends_changes:
            return Request((5, 6), forge(frames))
        path = Path(0 if way else len(frames), Reference(ROUND, self.values).checksum)
        return Request((5, 6), forge(frames), run=7, paths=(path,))

    def receive(self, payload: bytes) -> list[Start]:
        """What a node does with a request before it trains."""
        request = read_request(payload)
        frames = frames_of(request)
        if frames[-1][-1].plan_digest != DIGEST:
            raise PlanError("another plan")
        if request.accepted:
            raise FrameError("no error feedback here")
        state = self.held if request.run else None
        return starts_of(request, frames, self.plan, self.pet, state)


def forge_request(siege: Siege, rng: random.Random) -> bytes:
    """Attack a request: its frames, its header, or the way it names to the reference."""
    way = rng.randrange(len(siege.frames))
    kind = rng.randrange(4)
    if kind < 2:
        return write_request(siege.request(way, lambda frames: attack(frames, rng)))
    packed = bytearray(write_request(siege.request(way)))
    if kind == 2:  # lengths, counts and parts of any size
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(44)
            wild = rng.choice([b"\0", b"\1", b"\x7f", b"\xff", b"\xff" * 4, rng.randbytes(8)])
            packed[at : at + len(wild)] = wild
        return bytes(packed)
    request = siege.request(way)
    path = Path(rng.choice([0, 1, 2, 3, 65535]), rng.getrandbits(32))
    return write_request(
        replace(request, run=rng.choice([0, 7]), paths=(path,) * rng.randint(1, 3))
    )


def besiege_node(num_requests: int, seed: int) -> int:
    """Attack that many times; return how many requests were obeyed, after checking each."""
    rng = random.Random(seed)
    sieges = [Siege(codec, rng) for codec in NODE_CODECS]
    obeyed = refused = 0
    for _ in range(num_requests):
        siege = rng.choice(sieges)
        try:
            starts = siege.receive(forge_request(siege, rng))
        except (FrameError, PlanError):
            refused += 1
            continue
        obeyed += 1
        for start in starts:
            assert start.tier == 0
            assert start.values.shape == (COUNT,)
            assert np.isfinite(start.values).all()
            # A reference is the one that the request's checksum names, or it is none.
            assert not siege.plan.sends_changes or (start.values == siege.values).all()
    assert refused > num_requests // 2
    return obeyed


@pytest.mark.parametrize("codec", NODE_CODECS)
def test_an_honest_request_leads_to_the_round_s_values(codec: CodecConfig) -> None:
    siege = Siege(codec, random.Random(0))
    for way in range(len(siege.frames)):
        [start] = siege.receive(write_request(siege.request(way)))
        assert start.values.tobytes() == siege.values.tobytes()


def test_no_attack_leads_a_node_to_other_values() -> None:
    besiege_node(1500, seed=0)


# ---------------------------------------------------------------- for long


@pytest.mark.slow
@pytest.mark.parametrize("besiege", [besiege_server, besiege_node])
def test_100_000_attacks_pass_no_wrong_frame_without_a_crash_or_a_pause(
    besiege: Callable[[int, int], int],
) -> None:
    # .venv/bin/python -m pytest -m slow tests/test_frame.py
    slowest = 0.0
    for seed in range(100):
        start = time.process_time()
        besiege(1000, seed)
        slowest = max(slowest, time.process_time() - start)
    assert slowest < 60  # for a thousand
