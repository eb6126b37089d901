"""A hostile server's plans: refused by the device's limits, before anything is allocated."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hostile_plans import CASES, hostile
from roll_call_runs import on_nodes
from tiny import Silent

from fedpet.client.node_config import NodeConfig
from fedpet.config import Experiment
from fedpet.errors import ConfigError, PlanError
from fedpet.protocol.plan import Plan
from fedpet.run.prepare import prepare

# Answers a message in a process of its own, with little memory and time beyond what it starts with.
CHILD = """
import json, resource, sys
from pathlib import Path
from fedpet.client.node import Node
from fedpet.client.node_config import NodeConfig
from fedpet.config import Experiment
from fedpet.protocol.frame import Frame, pack_frame, unpack_frames
from fedpet.protocol.plan import Plan
from fedpet.protocol.request import Request, write_request

config, folder, count = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
node_config = {"data": str(folder / "rows.jsonl"), "cache": str(folder / "cache"), "client": "c"}
settings = NodeConfig.from_experiment(Experiment.from_run_config(config), node_config)
start = resource.getrusage(resource.RUSAGE_SELF)
resource.setrlimit(resource.RLIMIT_CPU, (int(start.ru_utime + start.ru_stime) + 20,) * 2)
plan = (folder / "plan").read_bytes()
frame = pack_frame(Frame(Plan.digest(plan), 1, 0, "float32", 5, 0, 0.0, 0.0, b""))
answers = []
for request in (Request((), b"", plan), Request((7,), frame, plan)):
    answer = Node(settings).answer(write_request(request))
    [part] = unpack_frames(answer, max_frames=1, max_payload_bytes=0)
    answers.append(part.reason)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start.ru_maxrss
left = sum(path.stat().st_size for path in folder.glob("cache/**/*") if path.is_file())
print(json.dumps([answers, grown >> 10, left]))
"""


@pytest.fixture
def settings(experiment: Any) -> Experiment:
    return on_nodes(experiment)


@pytest.fixture
def plan(settings: Experiment) -> Plan:
    return prepare(settings, Silent()).plan


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_plan_is_refused_by_the_limit_that_it_is_beyond(
    settings: Experiment, plan: Plan, case: str
) -> None:
    node = NodeConfig.from_experiment(settings, {"data": "rows.jsonl"})
    with pytest.raises(PlanError, match=CASES[case]):
        node.read_plan(hostile(plan, case))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_device_answers_a_hostile_plan_soon_and_keeps_nothing_of_it(
    settings: Experiment, plan: Plan, files: tuple[Path, Path], tmp_path: Path, case: str
) -> None:
    folder = tmp_path / "device"
    folder.mkdir()
    (folder / "plan").write_bytes(hostile(plan, case))
    (folder / "rows.jsonl").write_bytes((files[1] / "train.jsonl").read_bytes())
    command = [sys.executable, "-c", CHILD, json.dumps(settings.to_run_config()), str(folder)]
    done = subprocess.run([*command, str(plan.num_values)], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    reasons, grown_mib, left = json.loads(done.stdout)
    assert all(CASES[case] in reason for reason in reasons), reasons
    assert grown_mib < 100
    assert left == 0


def test_the_owner_s_limits_are_node_toml_s(settings: Experiment, plan: Plan) -> None:
    node = NodeConfig.from_experiment(settings, {"data": "x.jsonl", "max-values": 10})
    with pytest.raises(PlanError, match=r"max-values = 10: its owner may raise it in node\.toml"):
        node.read_plan(plan.to_bytes())
    assert (
        NodeConfig.from_experiment(settings, {"data": "x.jsonl"}).read_plan(plan.to_bytes()) == plan
    )
    with pytest.raises(ConfigError, match="max-values in --node-config must be a int"):
        NodeConfig.from_experiment(settings, {"data": "x.jsonl", "max-values": "many"})
    with pytest.raises(ConfigError, match="max-disk-mib in --node-config must be at least 1"):
        NodeConfig.from_experiment(settings, {"data": "x.jsonl", "max-disk-mib": -1})


def test_a_simulated_node_has_no_limits(settings: Experiment, plan: Plan) -> None:
    many = replace(plan, training=replace(plan.training, local_epochs=10**6)).to_bytes()
    assert NodeConfig.from_experiment(settings).read_plan(many).training.local_epochs == 10**6
