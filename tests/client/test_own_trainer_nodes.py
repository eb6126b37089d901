"""One script serves Ray's workers, `flwr run` and real nodes, with the values of one process."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from deployed import Place
from flwr_runs import copy_app, flwr_run, local_superlink
from in_process_run import run
from language_models import experiment_of, make_rows, save_model
from test_own_trainer import CHAT, CLASSES, script

import fedpet
from fedpet.config import Experiment

pytestmark = [pytest.mark.simulation, pytest.mark.timeout(600)]
STEPS = {
    "optim": "adamw_torch_fused", "max_steps": 3, "per_device_train_batch_size": 2,
    "num_train_epochs": 1,
}  # fmt: skip


def test_a_script_trains_the_clients_of_ray_s_workers(tmp_path: Path) -> None:
    model, rows = save_model(tmp_path / "model"), make_rows(tmp_path / "rows")
    path = script(tmp_path, model, CHAT, **STEPS)
    experiment = experiment_of(model, rows, tmp_path / "ray", clients_script=path)
    found = fedpet.simulate(experiment, progress=False)
    alone = replace(experiment, run=replace(experiment.run, out=str(tmp_path / "alone")))
    assert found.result["final_values_sha256"] == run(alone)["final_values_sha256"]
    assert found.metrics["perplexity"] < found.history[0]["perplexity"]


def test_a_script_trains_the_clients_of_real_nodes(tmp_path: Path) -> None:
    rows = tiny.make_rows(tmp_path / "rows", clients=2, rows_per_client=8)
    backbone = tiny.make_backbone(tmp_path / "backbone")
    path = script(tmp_path, backbone, CLASSES, **STEPS)
    place = Place((backbone, rows), tmp_path, ["one", "two"])
    changes = {"strategy_num_rounds": 2}
    with place.deploy(2, bounds={"script": path}, **changes) as real:
        real.start_server()
        real.register()
        for name in place.names:
            real.start_node(name)
        done = real.run(limit_seconds=400)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        result = real.result("tiny-1")
    expected = place.expected(place.names, script=Path(path), **changes)
    assert result["final_values_sha256"] == expected
    assert result["final_values_sha256"] != place.expected(place.names, **changes)


@pytest.mark.slow
def test_a_script_in_a_flower_app_trains_the_clients_of_flwr_run(
    repository: Path, tmp_path: Path
) -> None:
    rows = tiny.make_rows(tmp_path / "rows", clients=3, rows_per_client=8)
    backbone = tiny.make_backbone(tmp_path / "backbone")
    path = script(tmp_path, backbone, CLASSES, **STEPS)
    app = copy_app(repository, tmp_path / "app")
    shutil.copy(path, app / "simulations" / "mine.py")

    def settings(path: str) -> Experiment:
        changes = {"strategy_num_rounds": 2, "run_workers": 1, "clients_script": path}
        return tiny.make_experiment(backbone, rows, tmp_path / "alone", **changes)

    with local_superlink():
        result = flwr_run(app, settings("simulations/mine.py"), tmp_path)
    assert result["final_values_sha256"] == run(settings(path))["final_values_sha256"]
    own_loop = run(replace(settings(""), run=replace(settings("").run, out=str(tmp_path / "own"))))
    assert result["final_values_sha256"] != own_loop["final_values_sha256"]
