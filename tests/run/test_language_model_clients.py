"""Language models measured on clients' own rows: packed blocks and conversations, on nodes too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process_run import run
from language_models import experiment_of, make_rows, save_model
from tiny import Silent

import fedpet
from fedpet.client.node import Node
from fedpet.client.node_config import NodeConfig
from fedpet.config import Experiment
from fedpet.run.federate import federate, prepare
from fedpet.run.local_grid import LocalGrid
from fedpet.run.prepare import Prepared
from fedpet.run.run_folder import new_run_folder
from fedpet.server.client_spread import spread_of
from fedpet.training.evaluation import predict
from fedpet.training.metrics import metric_value

Make = Callable[..., Experiment]
TASKS = ("language-modelling", "instruction")
CLIENTS = 4


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("files")
    return save_model(folder / "model"), make_rows(folder / "rows", clients=CLIENTS, rows=12)


@pytest.fixture
def experiment(files: tuple[Path, Path], tmp_path: Path) -> Make:
    def make(**changes: Any) -> Experiment:
        settings = {
            "clients_eval_fraction": 0.3, "clients_min_rows": 1, "data_max_length": 24,
            "strategy_clients_per_round": CLIENTS,
        } | changes  # fmt: skip
        out = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        return experiment_of(*files, out, **settings)

    return make


def on_own_nodes(experiment: Experiment, rows: Path, folder: Path) -> dict[str, Any]:
    """Run it with a node for each client, which holds that client's rows alone."""
    clients = replace(experiment.clients, partition="nodes", num_clients=CLIENTS)
    experiment = replace(experiment, clients=clients)
    handlers: dict[int, Callable[[bytes], bytes]] = {}
    lines = (rows / "train.jsonl").read_text().splitlines()
    for number in range(CLIENTS):
        own = [line for line in lines if json.loads(line)["client"] == f"client {number}"]
        path = folder / f"node {number}.jsonl"
        path.write_text("\n".join(own) + "\n")
        given = {
            "data": str(path),
            "client": f"client {number}",
            "cache": str(folder / str(number)),
        }
        handlers[number + 1] = Node(NodeConfig.from_experiment(experiment, given)).answer
    prepared = prepare(experiment, Silent())
    return federate(LocalGrid(handlers), prepared, new_run_folder(experiment), Silent())


@pytest.mark.parametrize("task", TASKS)
def test_clients_measure_the_tokens_that_they_hold_out(task: str, experiment: Make) -> None:
    settings = experiment(data_task=task, strategy_num_rounds=1)
    quality = run(settings)["quality"]
    prepared = prepare(settings, Silent())
    assert isinstance(prepared, Prepared)
    data, pet = prepared.data, prepared.pet
    held = np.concatenate([client.held_out for client in data.clients])
    trained = np.concatenate([client.rows for client in data.clients])
    assert len(held)
    assert not set(held) & set(trained)
    rows = data.train.take(held)
    pet.set_delta(torch.zeros(pet.num_values))
    pooled = metric_value(data.task, predict(pet.model, rows, data.task), np.asarray(rows.labels))
    [before] = quality["on_clients"]["before"]
    assert before["rows"] == rows.labels.sum()  # label tokens
    assert before["row_mean"] == pytest.approx(pooled)  # of all tokens, no mean of perplexities
    assert quality["on_clients"]["after"][0]["row_mean"] < before["row_mean"]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("eval_on", ["server", "clients"])
def test_nodes_with_rows_of_their_own_measure_as_a_simulation_does(
    task: str, eval_on: str, experiment: Make, files: tuple[Path, Path], tmp_path: Path
) -> None:
    changes = {"data_task": task, "data_eval_on": eval_on, "run_keep": "best"}
    simulated = run(experiment(**changes), nodes=2)
    deployed = on_own_nodes(experiment(**changes), files[1], tmp_path)
    assert deployed["refused"] == []
    assert deployed["final_values_sha256"] == simulated["final_values_sha256"]
    assert deployed["quality"]["on_clients"] == simulated["quality"]["on_clients"]
    assert deployed["run"]["kept"] == simulated["run"]["kept"]
    names = {"before", "after"} | ({"seen"} if eval_on == "clients" else set())
    assert set(deployed["quality"]["on_clients"]) == names
    assert deployed["quality"]["final"] < deployed["quality"]["by_round"][0]["value"]


@pytest.mark.parametrize("task", TASKS)
def test_clients_that_never_train_measure_all_their_tokens(task: str, experiment: Make) -> None:
    settings = experiment(data_task=task, clients_unseen_fraction=0.4, clients_seed=1)
    result = run(settings)
    [unseen] = result["quality"]["on_clients"]["unseen"]
    assert 0 < result["data"]["clients_unseen"] < CLIENTS
    assert unseen["clients"] == result["data"]["clients_unseen"]
    assert unseen["rows"] > 0


def test_a_client_whose_text_left_to_train_on_is_too_few_blocks_holds_none_out(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    rows = tmp_path / "rows"
    shutil.copytree(files[1], rows)
    settings = {
        "data_task": "language-modelling", "data_max_length": 24, "clients_eval_fraction": 0.6,
    }  # fmt: skip
    sizes = {}
    for fraction in (0.0, 0.6):
        more = settings | {"clients_eval_fraction": fraction, "clients_min_rows": 1}
        prepared = prepare(experiment_of(files[0], rows, tmp_path / "run", **more), Silent())
        sizes[fraction] = {c.id: len(c.rows) for c in prepared.data.clients}
    least = min(sizes[0.6].values()) + 1  # blocks, that some have only with what they held out
    assert all(count >= least for count in sizes[0.0].values())
    more = settings | {"clients_min_rows": least}
    data = prepare(experiment_of(files[0], rows, tmp_path / "run", **more), Silent()).data
    assert {c.id for c in data.clients} == set(sizes[0.0])  # nobody is left out of the run
    assert all(len(client.rows) >= least for client in data.clients)
    for client in data.clients:
        if not len(client.held_out):
            assert len(client.rows) == sizes[0.0][client.id]
    assert {bool(len(client.held_out)) for client in data.clients} == {True, False}


def test_the_mean_of_perplexities_by_tokens_is_that_of_all_tokens() -> None:
    losses, tokens = np.array([3.0, 1.0, 2.5]), np.array([10, 200, 30])
    measured = [(int(n), float(np.exp(x))) for n, x in zip(tokens, losses, strict=True)]
    found = spread_of(measured, "perplexity")
    assert found["row_mean"] == pytest.approx(np.exp((losses * tokens).sum() / tokens.sum()))
    assert found["mean"] == pytest.approx(np.exp(losses).mean())
    assert found["worst"] == pytest.approx(np.exp(3.0))
    assert spread_of(measured, "loss")["row_mean"] < found["row_mean"] * 10


@pytest.mark.simulation
@pytest.mark.parametrize("task", TASKS)
def test_ray_s_workers_measure_what_one_process_measures(task: str, experiment: Make) -> None:
    changes = {"data_task": task, "data_eval_on": "clients", "clients_unseen_fraction": 0.3}
    alone = run(experiment(**changes))
    found = fedpet.simulate(experiment(**changes), progress=False)
    assert found.result["final_values_sha256"] == alone["final_values_sha256"]
    assert found.result["quality"]["on_clients"] == alone["quality"]["on_clients"]
