"""Workers that die in the middle of a run are started again, and nothing comes out otherwise."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from in_process_run import run
from tiny import Silent

from fedpet.client.node import reply
from fedpet.client.node_config import NodeConfig
from fedpet.config import Experiment
from fedpet.protocol.flower_compat.flower_simulation import RESTARTS
from fedpet.protocol.ledger import Ledger, RoundRecord
from fedpet.run.federate import federate, prepare
from fedpet.run.ray_engine import run_on_ray
from fedpet.run.run_folder import new_run_folder

pytestmark = [pytest.mark.simulation, pytest.mark.timeout(300)]


class KillsIdleWorkers(Silent):
    """Kills every worker when the first round is over."""

    killed = 0

    def on_round_end(self, record: RoundRecord, ledger: Ledger) -> None:  # type: ignore[override]
        if record.round != 1:
            return
        for process in psutil.Process().children(recursive=True):
            if "ClientAppActor" in " ".join(process.cmdline()):
                process.kill()
                self.killed += 1


def killed_once(settings: NodeConfig, folder: Path) -> ClientApp:
    """Workers that die once in their second message, when they have trained and not answered."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        answer = reply(message, settings)
        node = folder / str(context.node_config["partition-id"])
        marks = [node.with_suffix(".first"), node.with_suffix(".second")]  # the app is pickled anew
        if left := [mark for mark in marks if not mark.exists()]:
            left[0].touch()
        if len(left) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    return app


@pytest.mark.slow
def test_a_run_whose_workers_are_all_killed_ends_with_the_bytes_of_an_undisturbed_one(
    experiment: Callable[..., Experiment], tmp_path: Path
) -> None:
    # With error feedback a client's residual is on the disk already when its worker dies.
    changes: dict[str, Any] = {
        "strategy_num_rounds": 3,
        "codec_uplink": "topk-0.2+eden-4",
        "codec_error_feedback": True,
    }
    undisturbed = run(experiment(**changes), nodes=2)
    disturbed, listener = experiment(**changes), KillsIdleWorkers()
    prepared = prepare(disturbed, listener)
    out = new_run_folder(disturbed)
    result = run_on_ray(
        disturbed,
        lambda: killed_once(NodeConfig.from_experiment(disturbed), tmp_path),
        lambda grid: federate(grid, prepared, out, listener),
    )
    assert len(list(tmp_path.glob("*.second"))) == 2, "each died of a message"
    assert listener.killed == 2
    assert result["refused"] == []
    assert result["final_values_sha256"] == undisturbed["final_values_sha256"]
    for name in ("uplink_bytes", "downlink_bytes", "plan_bytes", "messages"):
        assert result["communication"][name] == undisturbed["communication"][name]


def test_a_cohort_that_kills_its_worker_each_time_is_refused_and_the_next_round_is_whole(
    experiment: Callable[..., Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RESTARTS, "max_task_retries", 1)  # each start of a worker takes seconds
    settled, tries = experiment(strategy_num_rounds=2, strategy_quorum=0.1), 2
    prepared, out = prepare(settled, Silent()), new_run_folder(settled)
    settings = NodeConfig.from_experiment(settled)
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        first = context.node_config["partition-id"] == 0
        if first and len(list(tmp_path.glob("died-*"))) < tries:
            (tmp_path / f"died-{os.getpid()}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return reply(message, settings)

    result = run_on_ray(settled, lambda: app, lambda grid: federate(grid, prepared, out, Silent()))
    assert len(list(tmp_path.glob("died-*"))) == tries
    assert [refused["round"] for refused in result["refused"]] == [1, 1]
    assert all("its worker died" in refused["reason"] for refused in result["refused"])
