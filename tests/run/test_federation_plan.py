"""The plan of a run: sent to a node once, and again where it was lost or damaged."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from in_process_run import run

from fedpet.client.node import Node
from fedpet.client.node_config import NodeConfig
from fedpet.protocol.request import read_request
from fedpet.run.local_grid import LocalGrid


def test_the_plan_travels_once_to_a_node_and_again_when_the_node_has_lost_it(
    experiment: Any,
) -> None:
    settings = experiment(strategy_num_rounds=3, run_workers=1)
    seen: list[int] = []
    plans = Path(settings.run.cache) / "plans"
    node = [Node(NodeConfig.from_experiment(settings))]

    def forgetful(payload: bytes) -> bytes:
        request = read_request(payload)
        seen.append(len(request.plan))
        if len(seen) == 2:  # the device is wiped between two rounds
            for file in plans.iterdir():
                file.unlink()
            node[0] = Node(NodeConfig.from_experiment(settings))
        return node[0].answer(payload)

    result = run(settings, LocalGrid({1: forgetful}))
    assert [bool(size) for size in seen] == [True, False, True, False]
    assert result["refused"] == []
    assert result["final_values_sha256"] == run(experiment())["final_values_sha256"]


@pytest.mark.parametrize("damage", [lambda whole: b"", lambda whole: whole[:-3], lambda w: w * 2])
def test_a_plan_that_was_damaged_on_the_device_s_disk_is_sent_again(
    experiment: Any, damage: Callable[[bytes], bytes]
) -> None:
    settings = experiment(strategy_num_rounds=2)
    seen: list[int] = []

    def device(payload: bytes) -> bytes:
        seen.append(len(read_request(payload).plan))
        if len(seen) == 2:  # it lost power while the plan was written
            [plan] = (Path(settings.run.cache) / "plans").iterdir()
            plan.write_bytes(damage(plan.read_bytes()))
        return Node(NodeConfig.from_experiment(settings)).answer(payload)

    assert run(settings, LocalGrid({1: device}))["refused"] == []
    assert [bool(size) for size in seen] == [True, False, True]


def test_plans_that_nothing_asked_for_in_months_are_removed(experiment: Any) -> None:
    settings = experiment(strategy_num_rounds=1)
    plans = Path(settings.run.cache) / "plans"
    plans.mkdir(parents=True, exist_ok=True)
    for name, age in (("old.plan", 100), ("recent.plan", 10)):
        (plans / name).write_bytes(b"")
        os.utime(plans / name, (time.time() - age * 86400,) * 2)
    run(settings)
    assert {path.name for path in plans.iterdir()} >= {"recent.plan"}
    assert not (plans / "old.plan").exists()
