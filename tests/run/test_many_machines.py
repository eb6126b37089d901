"""Raylets on the loopback stand in for machines: the same bits, and one of them may die.

pytest -m "simulation and slow" tests/run/test_many_machines.py
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from in_process_run import run
from loopback_cluster import LoopbackCluster
from tiny import Silent

from fedpet.client.node import reply
from fedpet.client.node_config import NodeConfig
from fedpet.config import Experiment
from fedpet.errors import ConfigError
from fedpet.protocol.ledger import Ledger, RoundRecord
from fedpet.run import ray_engine, worker_pool
from fedpet.run.cluster_node import ClusterNode
from fedpet.run.federate import federate, prepare
from fedpet.run.local_grid import LocalGrid
from fedpet.run.run_folder import new_run_folder

pytestmark = [pytest.mark.simulation, pytest.mark.slow, pytest.mark.timeout(400)]

MACHINES = ("one", "two")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackCluster]:
    """A head without workers, and two machines with a core each."""
    temporary = Path(tempfile.mkdtemp(prefix="fp-"))
    started = LoopbackCluster(tmp_path_factory.mktemp("machines"), temporary)
    try:
        for name in MACHINES:
            started.add(name)
        yield started
    finally:
        started.shutdown()
        shutil.rmtree(temporary, ignore_errors=True)


@pytest.fixture(autouse=True)
def _joined(cluster: LoopbackCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Join the cluster; the checkpoint's folder is on the machine of the run alone."""
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    offer = ClusterNode.of.__func__  # type: ignore[attr-defined]

    def of(cls: type[ClusterNode], *given: Any) -> ClusterNode:
        node = offer(cls, *given)
        elsewhere = replace(node.settings.backbone, model="/nowhere/checkpoint")
        unread = replace(node.settings.data, source="/nowhere/rows")
        return replace(node, settings=replace(node.settings, backbone=elsewhere, data=unread))

    monkeypatch.setattr(ClusterNode, "of", classmethod(of))


@pytest.fixture
def alone(experiment: Callable[..., Experiment]) -> Callable[..., Experiment]:
    """Makes experiments that name no cache."""
    return lambda **changes: experiment(run_cache="", **changes)


class StopsAfterTheFirstRound(Silent):
    def on_round_end(self, record: RoundRecord, ledger: Ledger) -> None:  # type: ignore[override]
        if record.round == 1:
            raise KeyboardInterrupt


def test_machines_without_a_common_folder_give_the_bytes_of_one_process(
    cluster: LoopbackCluster, alone: Callable[..., Experiment]
) -> None:
    expected = run(alone())
    found, _ = ray_engine.simulate(alone(), Silent())
    assert found["refused"] == []
    assert found["final_values_sha256"] == expected["final_values_sha256"]
    for name in MACHINES:
        assert list(cluster.cache(name).glob("plans/*.plan")), "it has trained"
        assert len(list(cluster.cache(name).glob("checkpoints/*/model.safetensors"))) == 1
        assert not (cluster.cache(name) / "rows").exists(), "rows come tokenised"
        assert not list(cluster.home(name).glob(".cache/fedpet"))


def test_a_run_that_was_cut_short_in_one_process_goes_on_on_a_cluster_to_the_same_bytes(
    alone: Callable[..., Experiment],
) -> None:
    expected, cut = run(alone()), alone()
    grid = LocalGrid.of(NodeConfig.from_experiment(cut), 1)
    prepared, out, stops = prepare(cut, Silent()), new_run_folder(cut), StopsAfterTheFirstRound()
    with pytest.raises(KeyboardInterrupt):
        federate(grid, prepared, out, stops)
    found, _ = ray_engine.resume(Path(cut.run.out), Silent())
    assert found["final_values_sha256"] == expected["final_values_sha256"]


def test_error_feedback_on_machines_with_caches_of_their_own_is_refused_with_the_key_to_set(
    alone: Callable[..., Experiment],
) -> None:
    settled = alone(codec_uplink="topk-0.2+eden-4", codec_error_feedback=True)
    with pytest.raises(ConfigError, match=r"the machine .* its cache .*is its own.*run\.cache"):
        ray_engine.simulate(settled, Silent())


def test_a_machine_that_dies_in_a_round_takes_no_client_with_it(
    cluster: LoopbackCluster,
    alone: Callable[..., Experiment],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_pool, "HOMELESS_SECONDS", 4.0)
    # A reference of the values is on the machine that dies, and the other one has not all of it.
    changes = {"codec_uplink": "dither-3", "codec_downlink": "dither-5"}
    expected = run(alone(**changes))
    monkeypatch.setattr(
        ray_engine,
        "_client_app",
        lambda prepared: app_that_ends_its_machine(
            ray_engine._settings(prepared), str(cluster.cache("two")), tmp_path / "died"
        ),
    )
    found, _ = ray_engine.simulate(alone(**changes), Silent())
    assert (tmp_path / "died").exists()
    assert found["refused"] == []
    assert found["final_values_sha256"] == expected["final_values_sha256"]


def app_that_ends_its_machine(
    settings: Callable[[], NodeConfig], cache: str, marker: Path
) -> ClientApp:
    """Workers of one machine kill it in the second message, trained and not answered."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        answer = reply(message, settings())
        if os.environ["FEDPET_CACHE"] == cache and not marker.exists():
            try:
                marker.with_name("trained once").touch(exist_ok=False)
            except FileExistsError:
                marker.touch()
                os.kill(os.getppid(), signal.SIGKILL)  # the raylet's
                os.kill(os.getpid(), signal.SIGKILL)
        return answer

    return app
