"""Adversaries of a server and of a node: nothing wrong passes, and a refusal is cheap (law 7)."""

from __future__ import annotations

import contextlib
import math
import random
import tracemalloc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import fake_training
import msgspec
import numpy as np
import pytest
from frame_mutations import attack
from hypothesis import given, settings
from hypothesis import strategies as st
from sending import codec_of

from fedpet.client.global_values import TierValues, decode_global_values, frames_by_tier
from fedpet.codec import VectorCodec
from fedpet.config import CodecConfig
from fedpet.errors import FrameError, PlanError
from fedpet.pet.layout import Segment
from fedpet.protocol.codec_seeds import downlink_seed
from fedpet.protocol.frame import Frame, Refusal, pack_frame, unpack_frames
from fedpet.protocol.plan import Plan
from fedpet.protocol.request import Path, Request, read_request, write_request
from fedpet.protocol.shared_reference import Reference, encode_full

DIGEST = bytes(range(16))
GROUPS = [(0, 150), (150, 180)]
COUNT = 180
ROUND = 4
CODECS = ("float32", "bfloat16", "int8", "int4", "eden-1", "eden-4", "eden-8", "topk-0.1+eden-4")
HEADS = (("eden-4", "int8"), ("topk-0.1+eden-2", "float32"), ("float32", "topk-0.5+int4-raw"))
CODINGS = (
    *(VectorCodec.of(GROUPS, codec=codec) for codec in CODECS),
    *(VectorCodec.of(GROUPS, GROUPS[1:], codec=codec, head_codec=head) for codec, head in HEADS),
)


# ---------------------------------------------------------------- of a server


def receive(buffer, coding, count=COUNT):
    """Read a reply as a server does: the frames that pass every check, or a `FrameError`."""
    accepted = []
    most = coding.max_payload_bytes
    for frame in unpack_frames(buffer, max_frames=3, max_payload_bytes=most):
        if (frame.plan_digest, frame.server_round) != (DIGEST, ROUND):
            raise FrameError("another plan or round")
        if isinstance(frame, Refusal):
            continue
        if (frame.codec, frame.count) != (coding.codec, count):
            raise FrameError("another codec or length")
        values = coding.decode(frame.payload, seed=ROUND)
        accepted.append((frame, values))
    return accepted


def honest_reply(coding, rng, count=COUNT, clients=3):
    packed = []
    for client in range(rng.randint(1, clients)):
        values = np.random.default_rng(rng.getrandbits(32)).standard_normal(count)
        payload = coding.encode(values, seed=ROUND)
        assert len(payload) <= coding.max_payload_bytes
        frame = Frame(DIGEST, ROUND, client, coding.codec, count, 10, 0.5, 1.0, payload)
        packed.append(pack_frame(frame))
    return packed


HONEST = {
    coding: [honest_reply(coding, random.Random(seed)) for seed in range(8)] for coding in CODINGS
}


def attack_server(rng):
    """Attack once; say whether anything was accepted, after checking that."""
    coding = rng.choice(CODINGS)
    reply = attack(rng.choice(HONEST[coding]), rng)
    try:
        frames = receive(reply, coding)
    except FrameError:
        return False
    for frame, values in frames:
        assert (frame.plan_digest, frame.server_round) == (DIGEST, ROUND)
        assert (frame.codec, frame.count) == (coding.codec, COUNT)
        assert math.isfinite(frame.loss)
        assert values.shape == (COUNT,)
        assert np.isfinite(values).all()
        # What was accepted is whole: it is in the reply as it would be packed.
        assert pack_frame(frame) in reply
    return bool(frames)


def test_no_attack_on_a_server_passes_a_wrong_frame():
    rng = random.Random(0)
    accepted = sum(attack_server(rng) for _ in range(1500))
    assert 0 < accepted < 750  # an attack is no harmless noise, nor is all refused


@pytest.mark.parametrize("codec", CODECS)
def test_an_attack_costs_no_more_memory_than_its_plan_allows(codec):
    # A value takes at most 40 bytes while it is decoded, and a reply at most itself once more.
    count = 50_000
    coding = VectorCodec.of([(0, 40_000), (40_000, count)], codec=codec)
    rng = random.Random(0)
    honest = honest_reply(coding, rng, count, clients=1)
    receive(b"".join(honest), coding, count)  # load what is loaded once
    replies = [attack(honest, rng) for _ in range(40)]
    tracemalloc.start()
    try:
        for reply in [b"".join(honest), *replies]:
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            with contextlib.suppress(FrameError):
                receive(reply, coding, count)
            peak = tracemalloc.get_traced_memory()[1] - before
            assert peak < 40 * count + len(reply) + 30_000
    finally:
        tracemalloc.stop()


# ---------------------------------------------------------------- of a node


LAYOUT = [Segment("mask", "w", 0, 150), Segment("head", "h", 150, 30)]
FIRST = 2  # the round whose reference the node holds
NODE_CODECS = (
    codec_of(downlink="eden-4"),
    codec_of(downlink="int8", head_downlink="bfloat16"),
    codec_of(downlink="topk-0.1+eden-2", head_downlink="float32"),
    codec_of(downlink="bfloat16", downlink_mode="full"),
    codec_of(downlink="eden-1", head_downlink="int4-raw", downlink_mode="full"),
    codec_of(downlink="float32"),
)


class Held:
    """Stand in for a node's state of a run: one reference in memory, and none on disk."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference

    def reference_in_memory(self, tier: int) -> Reference:
        return self._reference

    def reference_on_disk(self, tier: int, count: int) -> None: ...
    def keep_reference(self, tier: int, reference: Reference) -> None: ...


class Siege:
    """A node under one plan, honest requests to it, and what they lead to."""

    def __init__(self, codec: CodecConfig, rng: random.Random) -> None:
        self.plan: Plan = fake_training.make_plan(codec=codec, num_values=COUNT)
        self.pet: Any = SimpleNamespace(tiers=[LAYOUT])
        random_values = np.random.default_rng(rng.getrandbits(32))
        held = random_values.standard_normal(COUNT).astype(np.float32)
        self.held: Any = Held(Reference(FIRST, held))
        self.values = held
        self.frames: list[list[bytes]] = []  # ways to the reference of the round, or its values
        coding = self.plan.downlink(GROUPS, GROUPS[1:])
        if not self.plan.is_delta_downlink:
            seed = downlink_seed(self.plan.seed, ROUND)
            payload = coding.encode(random_values.standard_normal(COUNT), seed=seed)
            self.values = coding.decode(payload, seed=seed)
            self.frames.append([self._pack(ROUND, coding.codec, payload)])
            return
        changes = []
        reference = Reference(FIRST, held)
        for server_round in range(FIRST + 1, ROUND + 1):
            seed = downlink_seed(self.plan.seed, server_round)
            payload = coding.encode(0.1 * random_values.standard_normal(COUNT), seed=seed)
            changes.append(self._pack(server_round, coding.codec, payload))
            reference = reference.moved(coding.decode(payload, seed=seed))
        self.values = reference.values
        self.frames.append(changes)
        self.frames.append([self._pack(ROUND, "float32", encode_full(reference))])

    def _pack(self, server_round: int, codec: str, payload: bytes) -> bytes:
        return pack_frame(Frame(DIGEST, server_round, 0, codec, COUNT, 0, 0.0, 0.0, payload))

    def request(self, way: int, forge: Callable[[list[bytes]], bytes] = b"".join) -> Request:
        """An honest request but for what `forge` makes of its frames."""
        frames = self.frames[way]
        if not self.plan.is_delta_downlink:
            return Request((5, 6), forge(frames))
        path = Path(0 if way else len(frames), Reference(ROUND, self.values).checksum)
        return Request((5, 6), forge(frames), run=7, paths=(path,))

    def receive(self, payload: bytes) -> list[TierValues]:
        """Read a request as a node does before it trains."""
        request = read_request(payload)
        frames = frames_by_tier(request)
        if frames[-1][-1].plan_digest != DIGEST:
            raise PlanError("another plan")
        if request.accepted:
            raise FrameError("no error feedback here")
        state = self.held if request.run else None
        return decode_global_values(request, frames, self.plan, self.pet, state)


def forge_request(siege: Siege, rng: random.Random) -> bytes:
    """Attack a request: its frames, its header, or the way it names to the reference."""
    way = rng.randrange(len(siege.frames))
    kind = rng.randrange(4)
    if kind < 2:
        return write_request(siege.request(way, lambda frames: attack(frames, rng)))
    packed = bytearray(write_request(siege.request(way)))
    if kind == 2:  # lengths, counts and parts of any size
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(min(44, len(packed)))
            wild = rng.choice([b"\0", b"\1", b"\x7f", b"\xff", b"\xff" * 4, rng.randbytes(8)])
            packed[at : at + len(wild)] = wild
        return bytes(packed)
    request = siege.request(way)
    path = Path(rng.choice([0, 1, 2, 3, 65535]), rng.getrandbits(32))
    return write_request(
        msgspec.structs.replace(request, run=rng.choice([0, 7]), paths=(path,) * rng.randint(1, 3))
    )


def attack_node(rng: random.Random) -> bool:
    """Attack once; say whether the request was obeyed, after checking to what it led."""
    siege = rng.choice(SIEGES)
    try:
        starts = siege.receive(forge_request(siege, rng))
    except (FrameError, PlanError):
        return False
    for start in starts:
        assert start.tier == 0
        assert start.values.shape == (COUNT,)
        assert np.isfinite(start.values).all()
        # A reference is the one that the request's checksum names, or it is none.
        assert not siege.plan.is_delta_downlink or (start.values == siege.values).all()
    return True


SIEGES = [Siege(codec, random.Random(0)) for codec in NODE_CODECS]


@pytest.mark.parametrize("codec", NODE_CODECS)
def test_an_honest_request_leads_to_the_round_s_values(codec: CodecConfig) -> None:
    siege = Siege(codec, random.Random(0))
    for way in range(len(siege.frames)):
        [start] = siege.receive(write_request(siege.request(way)))
        assert start.values.tobytes() == siege.values.tobytes()


def test_no_attack_leads_a_node_to_other_values() -> None:
    rng = random.Random(0)
    obeyed = sum(attack_node(rng) for _ in range(1500))
    assert 0 < obeyed < 750


# ---------------------------------------------------------------- drawn by hypothesis

ATTACKS = pytest.mark.parametrize("attack_once", [attack_server, attack_node])


@ATTACKS
@settings(max_examples=150, deadline=1000)  # milliseconds: no attack makes its reader hang
@given(rng=st.randoms(use_true_random=False))
def test_no_drawn_attack_passes(attack_once: Callable[[random.Random], bool], rng: Any) -> None:
    attack_once(rng)


@pytest.mark.slow
@ATTACKS
@settings(max_examples=100_000, deadline=1000)
@given(rng=st.randoms(use_true_random=False))
def test_100_000_drawn_attacks_pass_no_wrong_frame_without_a_crash_or_a_pause(
    attack_once: Callable[[random.Random], bool], rng: Any
) -> None:
    # .venv/bin/python -m pytest -m slow tests/protocol/test_frame_attacks.py
    attack_once(rng)
