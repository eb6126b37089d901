"""Devices of three strengths in one federation: real model, real strategy, real frames."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_process_run import run

from fedpet.backbone.pretrained import load_backbone
from fedpet.client.node import Node
from fedpet.client.node_config import NodeConfig
from fedpet.codec import decode_values
from fedpet.config import Experiment
from fedpet.errors import ConfigError
from fedpet.pet.tiers import draw_tier, tiers_of
from fedpet.protocol.frame import Frame, pack_frame, unpack_frames
from fedpet.protocol.plan import Plan
from fedpet.protocol.request import read_request
from fedpet.run.local_grid import LocalGrid
from fedpet.utils.seeds import client_id64, derive_seed

THREE = ["0.005=0.3", "0.02=0.4", "0.05=0.3"]
CLIENTS = [f"client {index}" for index in range(6)]
NUMBERS = [client_id64(client) for client in CLIENTS]


@pytest.fixture
def experiment(experiment: Callable[..., Experiment]) -> Callable[..., Experiment]:
    wanted = {"mask_tiers": THREE, "structure_preset": "lnfit"}
    wanted |= {"strategy_num_rounds": 2, "strategy_clients_per_round": 6}
    return lambda **changes: experiment(**wanted | changes)


def values_of_run(experiment: Experiment) -> np.ndarray:
    values: np.ndarray = np.load(Path(experiment.run.out) / "checkpoint" / "values.npy")
    return values


def plan_of_run(experiment: Experiment) -> Plan:
    return Plan.from_bytes((Path(experiment.run.out) / "plan.bin").read_bytes())


def tier_of(experiment: Experiment, client: str) -> int:
    return draw_tier(experiment.mask, client_id64(client))


class Listening:
    """A node that keeps what it was asked and what it answered."""

    def __init__(self, settings: NodeConfig) -> None:
        self._node = Node(settings)
        self.asked: list[tuple[list[int], list[int]]] = []  # counts of frames, clients
        self.frames: list[Frame] = []

    def answer(self, payload: bytes) -> bytes:
        request = read_request(payload)
        sent = unpack_frames(request.frame, max_frames=9, max_payload_bytes=1 << 30)
        self.asked.append(([f.count for f in sent if isinstance(f, Frame)], [*request.clients]))
        answer = self._node.answer(payload)
        parts = unpack_frames(answer, max_frames=99, max_payload_bytes=1 << 30)
        self.frames += [part for part in parts if isinstance(part, Frame)]
        return answer


def test_the_clients_of_these_tests_are_of_all_three_tiers(experiment: Any) -> None:
    assert sorted({tier_of(experiment(), client) for client in CLIENTS}) == [0, 1, 2]


# -- the average -----------------------------------------------------------------------------


def test_each_entry_is_averaged_over_the_clients_that_trained_it(experiment: Any) -> None:
    """Against plain numpy: a dense row of updates and of weights a client, NaN where untrained."""
    settings = experiment(strategy_num_rounds=1)
    node = Listening(NodeConfig.from_experiment(settings))
    run(settings, LocalGrid({1: node.answer}))
    plan = plan_of_run(settings)
    tiers = tiers_of(plan.build(load_backbone(settings.backbone, num_outputs=2)), plan.mask)
    updates = np.full((6, plan.num_values), np.nan)
    weights = np.zeros((6, plan.num_values))
    of = {client_id64(client): tier_of(settings, client) for client in CLIENTS}
    for row, frame in enumerate(node.frames):
        tier = tiers[of[frame.client]]
        assert frame.count == tier.count
        seed = derive_seed("encode", derive_seed("client", plan.seed, 1, frame.client))
        decoded = decode_values(frame.payload, frame.codec, tier.groups, seed=seed)
        updates[row, tier.where] = decoded
        weights[row, tier.where] = frame.num_examples
    assert len(node.frames) == 6
    expected = np.nansum(updates * weights, axis=0) / weights.sum(0)
    assert values_of_run(settings) == pytest.approx(expected, abs=1e-7)
    trained = (weights > 0).sum(0)
    assert sorted(set(trained)) == [1, 3, 6]  # by the strongest, by two tiers, by all


def test_entries_that_nobody_trained_stay_at_the_checkpoint(experiment: Any) -> None:
    settings = experiment(mask_tiers=["0.005=0.5", "0.02=0.5", "0.05=0"])
    result = run(settings)
    plan = plan_of_run(settings)
    tiers = tiers_of(plan.build(load_backbone(settings.backbone, num_outputs=2)), plan.mask)
    untrained = np.ones(plan.num_values, dtype=bool)
    untrained[tiers[1].where] = False
    values = values_of_run(settings)
    assert not values[untrained].any()
    assert (values[~untrained] != 0).mean() > 0.9
    assert [tier["clients"] for tier in result["model"]["tiers"]][-1] == 0


def test_tiers_with_every_client_in_the_strongest_are_no_tiers_to_the_bit(experiment: Any) -> None:
    tiers = run(experiment(mask_tiers=["0.005=0", "0.02=0", "0.05=1"]))
    none = run(experiment(mask_tiers=[]))
    assert tiers["final_values_sha256"] == none["final_values_sha256"]
    assert tiers["quality"] == none["quality"]
    assert tiers["run"]["plan_digest"] != none["run"]["plan_digest"]
    assert none["model"]["tiers"] == []


def test_a_client_of_a_tier_trains_as_in_a_run_of_that_density_alone(experiment: Any) -> None:
    updates = []
    for changes in ({}, {"mask_tiers": [], "mask_density": 0.02}):
        settings = experiment(strategy_num_rounds=1, **changes)
        node = Listening(NodeConfig.from_experiment(settings))
        run(settings, LocalGrid({1: node.answer}))
        updates.append({frame.client: frame.payload for frame in node.frames})
    middle = [c for c in CLIENTS if tier_of(experiment(), c) == 1]
    assert middle
    for client in map(client_id64, middle):
        assert updates[0][client] == updates[1][client]


# -- law 6, also with lossy codecs -----------------------------------------------------------


@pytest.mark.parametrize("codec", ["float32", "eden-4"])
def test_whom_a_client_shares_a_node_with_does_not_change_the_result(
    experiment: Any, codec: str
) -> None:
    lossy = {"codec_uplink": codec, "codec_downlink": codec}
    hashes = {run(experiment(**lossy), nodes=n)["final_values_sha256"] for n in (1, 2, 6)}
    assert len(hashes) == 1


# -- law 7 -----------------------------------------------------------------------------------


def test_a_frame_of_another_tier_s_count_is_refused_by_name(experiment: Any) -> None:
    settings = experiment(strategy_num_rounds=1)
    node = Node(NodeConfig.from_experiment(settings))
    weak, strong = (next(c for c in CLIENTS if tier_of(settings, c) == tier) for tier in (0, 2))

    def swapped(payload: bytes) -> bytes:
        parts = unpack_frames(node.answer(payload), max_frames=9, max_payload_bytes=1 << 30)
        frames = {part.client: part for part in parts if isinstance(part, Frame)}
        frames[client_id64(weak)] = replace(frames[client_id64(strong)], client=client_id64(weak))
        return b"".join(map(pack_frame, frames.values()))

    result = run(settings, LocalGrid({1: swapped}))
    [refused] = result["refused"]
    assert refused["who"] == weak
    counts = [tier["values"] for tier in result["model"]["tiers"]]
    assert f"asks this client for {counts[0]} values" in refused["reason"]
    assert f"the frame holds {counts[2]}" in refused["reason"]


# -- bytes -----------------------------------------------------------------------------------


def test_each_client_is_counted_with_what_its_own_tier_sends_and_receives(experiment: Any) -> None:
    raw = {"codec_uplink": "float32-raw", "codec_downlink": "float32-raw", "strategy_num_rounds": 1}
    alike = {}
    for density in (0.005, 0.02, 0.05):
        books = run(experiment(mask_tiers=[], mask_density=density, **raw))["communication"]
        alike[density] = books["uplink_bytes"] / 6, books["downlink_bytes"] / 6
    result = run(experiment(**raw))
    books = result["communication"]
    tiers = result["model"]["tiers"]
    assert [tier["density"] for tier in tiers] == list(alike)
    assert sum(tier["clients"] for tier in tiers) == 6
    for direction, index in (("uplink_bytes", 0), ("downlink_bytes", 1)):
        expected = sum(tier["clients"] * alike[tier["density"]][index] for tier in tiers)
        assert books[direction] == pytest.approx(expected, abs=1)


def test_with_one_client_a_node_the_bytes_are_those_on_the_wire(experiment: Any) -> None:
    """But for the ids in a message's metadata, which are shorter here than between machines."""
    apart = []
    for tiers in (THREE, []):
        changes = {"mask_tiers": tiers, "strategy_num_rounds": 1}
        books = run(experiment(**changes), nodes=6)["communication"]
        apart.append(books["total_bytes"] - books["wire_bytes"])
    assert apart[0] == pytest.approx(apart[1], abs=12)  # a byte a message


def test_a_node_is_sent_one_frame_a_tier_of_its_cohort_and_no_other(experiment: Any) -> None:
    settings = experiment()
    nodes = {number: Listening(NodeConfig.from_experiment(settings)) for number in (1, 2, 3)}
    result = run(settings, LocalGrid({n: node.answer for n, node in nodes.items()}))
    counts = [tier["values"] for tier in result["model"]["tiers"]]
    of = {client_id64(client): tier_of(settings, client) for client in CLIENTS}
    for node in nodes.values():
        for sent, clients in node.asked:
            assert sent == sorted({counts[of[client]] for client in clients})


# -- a node that knows its own tier ----------------------------------------------------------


def test_a_node_that_names_its_tier_is_asked_again_once_and_then_rightly(experiment: Any) -> None:
    settings = experiment(strategy_num_rounds=3)
    weak = Listening(NodeConfig.from_experiment(settings, {"max-density": 0.01}))
    result = run(settings, LocalGrid({1: weak.answer}))
    counts = [tier["values"] for tier in result["model"]["tiers"]]
    assert {frame.count for frame in weak.frames} == {counts[0]}
    drawn = {number: tier_of(settings, c) for c, number in zip(CLIENTS, NUMBERS, strict=True)}
    others = [number for number in NUMBERS if drawn[number]]
    first, again, *later = weak.asked
    assert first[0] == counts
    assert again == ([counts[0]], others)
    assert [sent for sent, _ in later] == [[counts[0]]] * 2
    assert result["refused"] == []
    assert [tier["clients"] for tier in result["model"]["tiers"]] == [6, 0, 0]
    expected = run(experiment(strategy_num_rounds=3, mask_tiers=["0.005=1", "0.02=0", "0.05=0"]))
    assert result["final_values_sha256"] == expected["final_values_sha256"]
    assert result["communication"]["downlink_bytes"] > expected["communication"]["downlink_bytes"]
    # The refusals that say the tier are sent too.
    assert result["communication"]["uplink_bytes"] > expected["communication"]["uplink_bytes"]


def test_a_node_too_weak_for_every_tier_is_refused_with_what_to_do(experiment: Any) -> None:
    settings = experiment(strategy_num_rounds=1, strategy_quorum=0.3)
    weak = Node(NodeConfig.from_experiment(settings, {"max-density": 0.001})).answer
    strong = Node(NodeConfig.from_experiment(settings)).answer
    result = run(settings, LocalGrid({1: weak, 2: strong}))
    assert len(result["refused"]) == 3
    for refused in result["refused"]:
        assert "at most 0.001 (max-density), the plan's least is 0.005" in refused["reason"]


@pytest.mark.parametrize("wrong", [0, 2, "half", True])
def test_a_strength_that_is_no_density_is_refused(experiment: Any, wrong: object) -> None:
    with pytest.raises(ConfigError, match=r"max-density must be in \(0, 1\]"):
        NodeConfig.from_experiment(experiment(), {"max-density": wrong})


def test_a_rule_that_compares_whole_replies_is_refused_with_tiers(experiment: Any) -> None:
    with pytest.raises(ConfigError, match=r"'fedmedian' compares whole replies, .* averages"):
        experiment(strategy_name="fedmedian")
    experiment(strategy_name="fedmedian", mask_tiers=["0.05=1"])


@pytest.mark.parametrize("rule", ["fedavgm", "fedadam"])
def test_a_server_s_optimiser_takes_the_mean_of_each_entry(experiment: Any, rule: str) -> None:
    changes = {"strategy_name": rule, "strategy_server_learning_rate": 0.5}
    assert run(experiment(**changes))["run"]["status"] == "ok"
    top = run(experiment(mask_tiers=["0.005=0", "0.05=1"], **changes))
    assert (
        top["final_values_sha256"]
        == (run(experiment(mask_tiers=[], **changes))["final_values_sha256"])
    )
