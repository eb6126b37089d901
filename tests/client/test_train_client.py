"""One client's values, from training to frame; and a node's refusals, by their codes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from modelless import (
    CLIENTS,
    NUM_VALUES,
    SEED,
    TWO_TIERS,
    FakeModels,
    FakeNode,
    make_plan,
    node_settings,
    train_by_formula,
)
from sending import codec_of

from fedpet.client.global_values import TierValues
from fedpet.client.plan_store import PlanStore
from fedpet.client.train_client import train_client
from fedpet.codec import encode_values
from fedpet.config import MaskConfig
from fedpet.errors import TrainingError
from fedpet.protocol.codec_seeds import downlink_seed
from fedpet.protocol.frame import Frame, Refusal, RefusalCode, pack_frame, unpack_frames
from fedpet.protocol.plan import Plan
from fedpet.protocol.request import Request, write_request
from fedpet.utils.seeds import client_id64

CLIENT = client_id64(CLIENTS[0])
START = np.linspace(-1, 1, NUM_VALUES, dtype=np.float32)


@pytest.fixture(autouse=True)
def formula(monkeypatch: pytest.MonkeyPatch) -> None:
    train_by_formula(monkeypatch)


def request_for(plan: Plan, *clients: int, with_plan: bool = True) -> Request:
    """A request of round 3 from the values `START`, coded without loss."""
    groups = [(0, NUM_VALUES)]
    payload = encode_values(START, "float32", groups, seed=downlink_seed(SEED, 3))
    digest = Plan.digest(plan.to_bytes())
    frame = Frame(digest, 3, 0, "float32", NUM_VALUES, 0, 0.0, 0.0, payload)
    return Request(clients, pack_frame(frame), plan.to_bytes() if with_plan else b"")


def answer(node: FakeNode, request: Request) -> list[Frame | Refusal]:
    packed = node.answer(write_request(request))
    return list(unpack_frames(packed, max_frames=9, max_payload_bytes=1 << 20))


def test_a_node_answers_with_the_frames_of_the_function(tmp_path: Path) -> None:
    plan = make_plan(codec_of(uplink="eden-4"))
    clients = [client_id64(name) for name in CLIENTS[:3]]
    frames = answer(FakeNode(node_settings(tmp_path)), request_for(plan, *clients))
    config = node_settings(tmp_path)
    loaded = FakeModels(config, PlanStore(config.cache)).load(Plan.digest(plan.to_bytes()))
    for client, frame in zip(reversed(clients), reversed(frames), strict=True):  # in any order
        expected, residual = train_client(loaded, TierValues(0, START), client, 3)
        assert frame == expected
        assert residual is None


def test_with_error_feedback_the_update_is_the_payload_and_the_residual(tmp_path: Path) -> None:
    plan = make_plan(codec_of(uplink="topk-0.1+int8", error_feedback=True))
    config = node_settings(tmp_path)
    plans = PlanStore(config.cache)
    plans.put(plan.to_bytes(), digest := Plan.digest(plan.to_bytes()))
    loaded = FakeModels(config, plans).load(digest)
    before = np.ones(NUM_VALUES, dtype=np.float32)
    first, left = train_client(loaded, TierValues(0, START), CLIENT, 3)
    second, left_with = train_client(loaded, TierValues(0, START), CLIENT, 3, before)
    assert left is not None
    assert left_with is not None
    assert first.payload != second.payload
    assert np.abs(left_with - left).max() > 0


def test_values_that_are_not_finite_raise_and_no_frame_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(codec_of())
    config = node_settings(tmp_path)
    plans = PlanStore(config.cache)
    plans.put(plan.to_bytes(), digest := Plan.digest(plan.to_bytes()))
    loaded = FakeModels(config, plans).load(digest)
    monkeypatch.setattr(
        type(loaded.pet), "train", lambda pet, client, seed: pet._values.fill_(float("nan"))
    )
    with pytest.raises(TrainingError, match=r"lower training\.learning-rate"):
        train_client(loaded, TierValues(0, START), CLIENT, 3)


# -- a node's refusals -----------------------------------------------------------------------


def test_a_node_without_the_plan_says_so_by_its_code(tmp_path: Path) -> None:
    plan = make_plan(codec_of())
    node = FakeNode(node_settings(tmp_path))
    [refusal] = answer(node, request_for(plan, CLIENT, with_plan=False))
    assert isinstance(refusal, Refusal)
    assert (refusal.code, refusal.client) == (RefusalCode.PLAN_MISSING, CLIENT)
    [frame] = answer(node, request_for(plan, CLIENT))
    assert isinstance(frame, Frame)


def test_a_node_of_another_tier_names_its_density_in_the_refusal(tmp_path: Path) -> None:
    plan = make_plan(codec_of(), TWO_TIERS)
    weak = FakeNode(replace(node_settings(tmp_path), max_density=0.01))
    [refusal] = answer(weak, request_for(plan, CLIENT))
    assert isinstance(refusal, Refusal)
    assert (refusal.code, refusal.density) == (RefusalCode.OTHER_TIER, 0.005)
    none = FakeNode(replace(node_settings(tmp_path), max_density=0.001))
    [refusal] = answer(none, request_for(plan, CLIENT))
    assert isinstance(refusal, Refusal)
    assert (refusal.code, refusal.density) == (RefusalCode.OTHER, 0.0)
    assert "max-density" in refusal.reason


def test_a_client_of_another_node_is_refused_and_the_others_train(tmp_path: Path) -> None:
    plan = make_plan(codec_of(), MaskConfig(density=0.02))
    node = FakeNode(node_settings(tmp_path))
    stranger, frame = answer(node, request_for(plan, 12345, CLIENT))
    assert isinstance(stranger, Refusal)
    assert stranger.code == RefusalCode.OTHER
    assert "does not live on this node" in stranger.reason
    assert isinstance(frame, Frame)


def test_a_tier_that_the_request_does_not_carry_refuses_all_its_clients(tmp_path: Path) -> None:
    request = request_for(make_plan(codec_of()), CLIENT, client_id64(CLIENTS[1]))
    refusals = answer(
        FakeNode(node_settings(tmp_path)), msgspec.structs.replace(request, which=(0, 1))
    )
    assert len(refusals) == 2
    for refusal in refusals:
        assert isinstance(refusal, Refusal)
        assert "tier 1, counted from 0, and carries 1" in refusal.reason
