"""Law 7 in whole runs: a wrong reply is refused by name and never becomes part of the average."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from in_process_run import Handler, run

from fedpet.backbone.pretrained import load_backbone
from fedpet.client.model_cache import LoadedPlan
from fedpet.client.node import Node
from fedpet.client.node_config import NodeConfig
from fedpet.errors import RunError
from fedpet.protocol.frame import Frame, pack_frame, unpack_frames
from fedpet.run.local_grid import LocalGrid
from fedpet.training.loop import TrainResult
from fedpet.utils.seeds import client_id64


def spoil(node: Handler, change: Callable[[Frame], bytes], victim: int) -> Handler:
    """A node whose answer for one client is changed on its way."""

    def answer(payload: bytes) -> bytes:
        out = []
        whole = node(payload)
        for frame in unpack_frames(whole, max_frames=99, max_payload_bytes=len(whole)):
            assert isinstance(frame, Frame)
            out.append(change(frame) if frame.client == victim else pack_frame(frame))
        return b"".join(out)

    return answer


WRONG = {
    "plan": lambda f: pack_frame(replace(f, plan_digest=b"\1" * 16)),
    "round": lambda f: pack_frame(replace(f, server_round=f.server_round + 1)),
    "values by": lambda f: pack_frame(replace(f, count=f.count - 1)),
    "at least 1 example": lambda f: pack_frame(replace(f, num_examples=0)),
    "at most the client's": lambda f: pack_frame(replace(f, num_examples=10**9)),
    "second frame": lambda f: pack_frame(f) * 2,
}


@pytest.mark.parametrize("word", WRONG)
def test_a_wrong_frame_is_refused_by_name_and_the_round_goes_on(experiment: Any, word: str) -> None:
    settings = experiment(strategy_num_rounds=1, strategy_clients_per_round=6)
    victim = client_id64("client 2")
    honest = Node(NodeConfig.from_experiment(settings)).answer
    change: Callable[[Frame], bytes] = WRONG[word]
    result = run(settings, LocalGrid({1: spoil(honest, change, victim)}))
    [refused] = result["refused"]
    assert refused["who"] == "client 2"
    assert word in refused["reason"]
    if word != "second frame":  # of a duplicate the first is kept; else the others are averaged
        without = experiment(strategy_num_rounds=1, strategy_clients_per_round=6)
        silent = spoil(Node(NodeConfig.from_experiment(without)).answer, lambda f: b"", victim)
        assert (
            run(without, LocalGrid({1: silent}))["final_values_sha256"]
            == (result["final_values_sha256"])
        )


def test_a_client_whose_training_gives_nan_is_refused_by_name(
    experiment: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _poison(monkeypatch, lambda client: client == client_id64("client 3"))
    result = run(experiment(strategy_num_rounds=1, strategy_clients_per_round=6))
    assert [r["who"] for r in result["refused"]] == ["client 3"]
    assert "NaN" in result["refused"][0]["reason"]
    assert result["run"]["status"] == "ok"


def test_a_run_in_which_every_client_gives_nan_fails(
    experiment: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _poison(monkeypatch, lambda client: True)
    settings = experiment(strategy_num_rounds=2)
    with pytest.raises(RunError, match="nothing was learned"):
        run(settings)
    lines = (Path(settings.run.out) / "rounds.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["refused"]) for line in lines] == [0, 4, 4]


def _poison(monkeypatch: pytest.MonkeyPatch, whom: Callable[[int], bool]) -> None:
    """Make the values of some clients NaN after their training, as a diverged step does."""
    from fedpet.client import train_client as module

    honest = module._train_or_search

    def diverged(resident: LoadedPlan, client: int, *args: Any) -> TrainResult:
        trained = honest(resident, client, *args)
        if whom(client):
            nan = torch.full((resident.pet.num_values,), math.nan)
            resident.pet.set_delta(nan, seed=0)
        return trained

    monkeypatch.setattr(module, "_train_or_search", diverged)


def test_a_node_that_raises_or_talks_nonsense_does_not_end_the_run(experiment: Any) -> None:
    def broken(payload: bytes) -> bytes:
        raise MemoryError("no room")

    settings = experiment(strategy_num_rounds=1, strategy_clients_per_round=6, strategy_quorum=0.3)
    honest = Node(NodeConfig.from_experiment(settings)).answer
    grid = LocalGrid({1: honest, 2: broken, 3: lambda payload: b"\x80\x04nonsense"})
    result = run(settings, grid)
    reasons = {r["who"]: r["reason"] for r in result["refused"]}
    assert sorted(reasons) == ["client 1", "client 2", "client 4", "client 5"]
    assert sum("no room" in reason for reason in reasons.values()) == 2
    assert result["run"]["status"] == "ok"


def test_a_round_below_its_quorum_leaves_the_values_alone(experiment: Any) -> None:
    settings = experiment(strategy_num_rounds=1, strategy_quorum=0.9)
    honest = Node(NodeConfig.from_experiment(settings)).answer

    def broken(payload: bytes) -> bytes:
        raise MemoryError("no room")

    with pytest.raises(RunError, match="quorum"):
        run(settings, LocalGrid({1: honest, 2: broken}))
    assert not np.load(Path(settings.run.out) / "checkpoint" / "values.npy").any()


def test_a_client_with_another_checkpoint_is_refused_with_both_fingerprints(
    experiment: Any, tmp_path: Path
) -> None:
    other = tiny.make_backbone(tmp_path / "other", seed=1)
    settings = experiment(strategy_num_rounds=1, strategy_clients_per_round=6)
    strange = replace(
        NodeConfig.from_experiment(settings), backbone=replace(settings.backbone, model=str(other))
    )
    nodes = {1: Node(NodeConfig.from_experiment(settings)).answer, 2: Node(strange).answer}
    result = run(settings, LocalGrid(nodes))
    theirs = load_backbone(strange.backbone, num_outputs=2).fingerprint
    assert result["refused"]
    for refused in result["refused"]:
        assert theirs[:16] in refused["reason"]
        assert result["run"]["fingerprint"][:16] in refused["reason"]


def test_a_run_with_no_node_says_so_and_ends(experiment: Any) -> None:
    with pytest.raises(RunError, match=r"no node came within 0\.1 seconds"):
        run(experiment(strategy_node_wait_seconds=0.1), LocalGrid({}))
