"""Law 6: the same seed gives the same values, whatever runs the rounds and however often they stop.

pytest -m "simulation and slow" tests/run/test_one_hash.py
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from in_process_run import run
from loopback_cluster import LoopbackCluster
from tiny import Silent

from benchmarks.real_nodes import RealNodes, loopback_deployment
from fedpet.client.node_config import NodeConfig
from fedpet.config import Experiment
from fedpet.deploy import write_deployment
from fedpet.errors import RunInterrupted
from fedpet.protocol.ledger import Ledger, RoundRecord
from fedpet.run import ray_engine
from fedpet.run.federate import federate, prepare
from fedpet.run.local_grid import LocalGrid
from fedpet.run.run_folder import new_run_folder

pytestmark = [pytest.mark.simulation, pytest.mark.slow, pytest.mark.timeout(600)]

CLIENTS = 6
Make = Callable[[], Experiment]


@pytest.fixture(scope="module")
def make(files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes the experiment, by the codec that is the default, each time with folders of its own."""
    assert Experiment().codec.uplink.startswith("dither")
    assert Experiment().training.padding_free

    def made() -> Experiment:
        settled = tiny.make_experiment(*files, tmp_path_factory.mktemp("run") / "run")
        return replace(
            settled, codec=Experiment().codec, run=replace(settled.run, cache="", workers=1)
        )

    return made


@pytest.fixture(scope="module")
def expected(make: Make) -> str:
    """The hash of all rounds by one node in this process."""
    return hash_of(run(make()))


@pytest.fixture(scope="module")
def raylets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a cluster: a head without workers, two machines of two cores."""
    temporary = Path(tempfile.mkdtemp(prefix="fp-"))
    cluster = LoopbackCluster(tmp_path_factory.mktemp("machines"), temporary)
    try:
        for name in ("one", "two"):
            cluster.add(name, cpus=2)
        yield cluster.address
    finally:
        cluster.shutdown()
        shutil.rmtree(temporary, ignore_errors=True)


def hash_of(result: dict[str, Any]) -> str:
    assert result["run"]["status"] == "ok"
    assert result["refused"] == []
    return str(result["final_values_sha256"])


def on_ray(experiment: Experiment, workers: int) -> str:
    settled = replace(experiment, run=replace(experiment.run, workers=workers))
    return hash_of(ray_engine.simulate(settled, Silent())[0])


@pytest.mark.parametrize("nodes", [2, 5])
def test_nodes_in_one_process_give_one_hash(make: Make, expected: str, nodes: int) -> None:
    assert hash_of(run(make(), nodes=nodes)) == expected


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_of_one_machine_give_one_hash(make: Make, expected: str, workers: int) -> None:
    assert on_ray(make(), workers) == expected


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_on_several_raylets_give_one_hash(
    make: Make, expected: str, raylets: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", raylets)
    assert on_ray(make(), workers) == expected


def test_a_run_cut_short_twice_gives_one_hash(
    make: Make, expected: str, raylets: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins on two nodes, goes on with one, and ends on raylets."""
    cut = make()
    grid = LocalGrid.of(NodeConfig.from_experiment(cut), 2)
    with pytest.raises(KeyboardInterrupt):
        federate(grid, prepare(cut, Silent()), new_run_folder(cut), StopsAfter(1))
    with pytest.raises((KeyboardInterrupt, RunInterrupted)):
        ray_engine.resume(Path(cut.run.out), StopsAfter(2), backend="in-process")
    monkeypatch.setenv("RAY_ADDRESS", raylets)
    assert hash_of(ray_engine.resume(Path(cut.run.out), Silent())[0]) == expected


class StopsAfter(Silent):
    def __init__(self, server_round: int) -> None:
        self._round = server_round

    def on_round_end(self, record: RoundRecord, ledger: Ledger) -> None:  # type: ignore[override]
        if record.round == self._round:
            raise KeyboardInterrupt


def test_real_nodes_that_hold_several_clients_give_one_hash(
    make: Make, files: tuple[Path, Path], expected: str, tmp_path: Path
) -> None:
    held = {"one": range(2), "two": range(2, CLIENTS)}
    (tmp_path / "evaluation").mkdir()
    shutil.copy(files[1] / "test.jsonl", tmp_path / "evaluation")
    settled = make()
    experiment = replace(
        settled,
        data=replace(settled.data, source=str(tmp_path / "evaluation")),
        run=replace(settled.run, out="", cache=str(tmp_path / "cache")),
    )
    several = {"client_column": "client", "clients_per_node": CLIENTS, "clients": CLIENTS}
    deployment = loopback_deployment(experiment, held, **several)
    write_deployment(deployment, tmp_path / "deployment")
    rows = (files[1] / "train.jsonl").read_text(encoding="utf-8").splitlines()
    for name, numbers in held.items():
        own = [row for row in rows if json.loads(row)["client"] in {f"client {n}" for n in numbers}]
        file = tmp_path / "deployment" / "nodes" / name / "data.jsonl"
        file.write_text("\n".join(own) + "\n", encoding="utf-8")
    with RealNodes(tmp_path / "deployment", deployment.port) as real:
        real.start_server()
        real.register()
        for name in held:
            real.start_node(name)
        done = real.run(limit_seconds=400)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        [result] = (tmp_path / "deployment" / "server" / "runs").glob("*/result.json")
    assert hash_of(json.loads(result.read_text(encoding="utf-8"))) == expected
