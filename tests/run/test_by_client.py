"""The spread over clients: the metric on each client's own held-out rows."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import in_process_run
import numpy as np
import pytest
from rich.console import Console
from tiny import make_backbone, make_experiment, make_rows

from fedpet.config import Experiment
from fedpet.data import Task, load_data, load_evaluation
from fedpet.report.run_table import run_table
from fedpet.run.finished import Run
from fedpet.training.evaluation import predict
from fedpet.training.metrics import assess


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("by_client")
    return make_backbone(folder / "b"), make_rows(folder / "r")


def spread_of(experiment: Experiment) -> dict[str, Any]:
    result = in_process_run.run(experiment)
    return dict(result["quality"]["by_client"])


def test_a_run_writes_the_spread_over_the_clients_of_its_evaluation_rows(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    experiment = make_experiment(*files, tmp_path / "run", strategy_num_rounds=1)
    spread = spread_of(experiment)
    lines = (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line)["by_client"]["clients"] for line in lines] == [6, 6]
    assert json.loads(lines[-1])["by_client"] == spread
    assert "client 0" not in (tmp_path / "run" / "result.json").read_text()

    data = load_data(experiment.data, experiment.clients, files[0], cache=tmp_path / "cache")
    model = Run(tmp_path / "run").model.merge_and_unload()
    right = predict(model, data.evaluation).argmax(axis=1) == data.evaluation.labels
    of_client = sorted(float(right[number::6].mean()) for number in range(6))  # as they were dealt
    assert spread["mean"] == pytest.approx(np.mean(of_client))
    assert [spread[k] for k in ("worst_decile", "worst", "best")] == [
        *of_client[:1] * 2,
        of_client[-1],
    ]
    assert spread["median_rows"] == 7  # of 40 among 6

    console = Console(width=80, record=True, file=io.StringIO())
    console.print(run_table(Run(tmp_path / "run").result))
    assert f"worst tenth {spread['worst']:.4f}" in console.export_text()


@pytest.mark.parametrize(
    "changes",
    [
        {"data_eval_split": "", "data_eval_fraction": 0.5},
        {"data_task": "regression", "data_metric": "mae"},
    ],
)
def test_held_out_rows_of_training_s_own_split_and_of_a_regression_have_a_spread(
    files: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    experiment = make_experiment(*files, tmp_path / "run", strategy_num_rounds=1, **changes)
    assert spread_of(experiment)["clients"] == 6


@pytest.mark.parametrize(
    "changes",
    [
        {"clients_partition": "iid", "clients_num_clients": 3},
        {"data_metric": "errors", "data_metrics": ["foreign_functions:errors"]},
    ],
)
def test_there_is_no_spread_where_clients_are_drawn_or_the_metric_is_the_user_s(
    files: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    experiment = make_experiment(*files, tmp_path / "run", strategy_num_rounds=1, **changes)
    assert spread_of(experiment) == {}
    assert "by_client" not in (tmp_path / "run" / "rounds.jsonl").read_text()


def test_evaluation_rows_need_not_name_their_clients(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    rows = make_rows(tmp_path / "r")
    lines = [json.loads(line) for line in (rows / "test.jsonl").read_text().splitlines()]
    for line in lines:
        del line["client"]
    (rows / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    experiment = make_experiment(files[0], rows, tmp_path / "run")
    arguments: dict[str, Any] = {"cache": tmp_path / "cache"}
    for _ in range(2):  # from the rows, and from the cache
        data = load_data(experiment.data, experiment.clients, files[0], **arguments)
        assert (len(data.evaluation), data.evaluation.clients) == (40, None)
    assert load_evaluation(experiment.data, files[0], **arguments).evaluation.clients is None


def test_the_worst_decile_is_the_mean_over_the_worst_tenth_of_the_clients() -> None:
    task, clients = Task("regression", (), "mae"), np.arange(20)[::-1]
    found = assess(task, clients[:, None].astype(float), np.zeros(20), clients).by_client
    assert found == {
        "clients": 20,
        "median_rows": 1.0,
        "mean": 9.5,
        "worst_decile": 18.5,
        "worst": 19.0,
        "best": 0.0,
    }
    assert assess(task, np.full((20, 1), np.nan), np.zeros(20), clients).by_client == {}
