"""One experiment by each way in: the installed command in an empty folder, and `flwr run`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import tomli_w
from flwr_runs import copy_app, flwr_run, local_superlink, read_result, run
from installed_wheel import build_wheel, install_wheel

from fedpet.config import Experiment

pytestmark = [pytest.mark.simulation, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    folder = tmp_path_factory.mktemp("tiny")
    backbone, rows = tiny.make_backbone(folder / "backbone"), tiny.make_rows(folder / "rows")
    changes = {"strategy_num_rounds": 2, "run_workers": 1}
    return tiny.make_experiment(backbone, rows, folder / "run", **changes)


@pytest.fixture(scope="module")
def simulated(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of `fedpet simulate`, from the wheel, where there is nothing but an experiment."""
    folder = tmp_path_factory.mktemp("wheel")
    binaries = install_wheel(build_wheel(folder), folder / "venv")
    empty = folder / "empty"
    empty.mkdir()
    (folder / "tiny.toml").write_text(tomli_w.dumps(experiment.to_tables()), encoding="utf-8")
    command = [binaries / "fedpet", "simulate", folder / "tiny.toml", "--out", empty / "run"]
    done = run(command, cwd=empty)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.name for path in empty.iterdir()] == ["run"]
    return read_result(empty / "run")


@pytest.fixture(scope="module")
def superlink() -> Iterator[None]:
    with local_superlink():
        yield


def test_the_wheel_simulates_in_an_empty_folder(simulated: dict[str, Any]) -> None:
    assert simulated["run"]["status"] == "ok"
    assert len(simulated["quality"]["by_round"]) >= 2


def test_flwr_run_gives_the_same_values_as_the_command(
    experiment: Experiment,
    simulated: dict[str, Any],
    superlink: None,
    repository: Path,
    tmp_path: Path,
) -> None:
    app = copy_app(repository, tmp_path / "app")
    result = flwr_run(app, experiment, tmp_path)
    assert result["final_values_sha256"] == simulated["final_values_sha256"]
