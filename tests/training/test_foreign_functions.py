"""A loss and metrics of one's own: found by name or import path, in whichever process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import foreign_functions
import numpy as np
import pytest
import tiny
import torch
from tiny import Silent

from fedpet.client.node import Node
from fedpet.client.node_config import NodeConfig
from fedpet.config import DataConfig, Experiment
from fedpet.data import Task
from fedpet.errors import ConfigError, RunError
from fedpet.run.federate import federate, prepare
from fedpet.run.local_grid import LocalGrid
from fedpet.run.run_folder import new_run_folder
from fedpet.training.loss import LOSSES, client_loss, register_loss
from fedpet.training.metrics import METRICS, assess, measure, register_metric

PATH = "foreign_functions:errors"
LOGITS = np.array([[0.1, 0.9], [0.2, 0.8], [0.4, 0.6], [0.9, 0.1]])
LABELS = np.array([1, 0, 0, 0])


def task(*metrics: str, decides: str = "accuracy") -> Task:
    return Task("classification", ("no", "yes"), decides, metrics)


def run(files: tuple[Path, Path], out: Path, **changes: Any) -> dict[str, Any]:
    settings: Experiment = tiny.make_experiment(*files, out, strategy_num_rounds=1, **changes)
    grid = LocalGrid({1: Node(NodeConfig.from_experiment(settings)).answer})
    return dict(federate(grid, prepare(settings, Silent()), new_run_folder(settings), Silent()))


def test_a_run_writes_every_metric_and_goes_by_the_one_that_is_named(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    result = run(files, tmp_path / "run", data_metric="errors", data_metrics=[PATH])
    quality = result["quality"]
    built_in = {"accuracy", "f1", "macro_f1", "weighted_f1", "balanced_accuracy", "matthews"}
    assert built_in | {"errors", "rows"} == set(quality["metrics"])
    assert quality["metric"] == "errors"
    assert quality["final"] == quality["metrics"]["errors"]
    rows = quality["metrics"]["rows"]
    assert quality["final"] == pytest.approx(rows * (1 - quality["metrics"]["accuracy"]))
    assert quality["best"] == min(entry["value"] for entry in quality["by_round"])
    lines = (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()
    assert [set(json.loads(line)["metrics"]) for line in lines] == [set(quality["metrics"])] * 2


def test_nodes_train_on_a_registered_loss_that_the_plan_names_by_its_path(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    plain = run(files, tmp_path / "plain")
    mine = [run(files, tmp_path / name.replace(":", "-"), training_loss=name)
            for name in ("focal", "foreign_functions:focal")]  # fmt: skip
    assert mine[0]["final_values_sha256"] == mine[1]["final_values_sha256"]
    assert mine[0]["run"]["plan_digest"] == mine[1]["run"]["plan_digest"]
    assert mine[0]["final_values_sha256"] != plain["final_values_sha256"]


def test_a_process_that_registered_nothing_finds_a_loss_by_its_path() -> None:
    code = "from fedpet.training.loss import LOSSES; print(LOSSES.find('foreign_functions:focal'))"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert "function focal" in ran.stdout


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("os:system", "'os:system' is no loss: put @fedpet.register_loss"),
        ("foreign_functions:not_registered", "is no loss"),
        ("foreign_functions:absent", "cannot be imported here"),
        ("no_such_package:focal", "cannot be imported here: No module named"),
        ("fokal", r"no loss 'fokal' is registered in this process \(.*focal"),
        (":", "cannot be imported here"),
    ],
)
def test_a_loss_that_is_none_is_refused_before_it_is_called(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        client_loss(LABELS, task(), 0.0, torch.device("cpu"), name)


def test_a_function_of_a_script_keeps_its_name_since_no_other_process_can_import_it() -> None:
    def local(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        return outputs.logits.sum()

    register_loss("local")(local)
    assert LOSSES.portable("local") == "local"
    assert LOSSES.portable("focal") == "foreign_functions:focal"
    assert LOSSES.portable("package.module:function") == "package.module:function"
    assert METRICS.portable("errors") == PATH


def test_a_name_belongs_to_one_function_and_the_same_one_may_be_registered_again() -> None:
    assert register_loss("focal")(foreign_functions.focal) is foreign_functions.focal
    with pytest.raises(ConfigError, match="'focal' is foreign_functions:focal"):
        register_loss("focal")(foreign_functions.not_registered)
    with pytest.raises(ConfigError, match="a word without ':'"):
        register_metric("a:b")(foreign_functions.errors)


def test_a_metric_that_needs_no_registration_is_trainer_s_compute_metrics() -> None:
    found = measure(task("foreign_functions:errors"), LOGITS, LABELS)
    assert (found["errors"], found["rows"], found["accuracy"]) == (2.0, 4.0, 0.5)


def test_the_metrics_of_imbalanced_classes_are_those_worked_out_by_hand() -> None:
    # class 0: tp 1, fn 2, fp 0; class 1: tp 1, fn 0, fp 2
    found = measure(task(), LOGITS, LABELS)
    assert found["macro_f1"] == pytest.approx((2 / 4 + 2 / 4) / 2)
    assert found["weighted_f1"] == pytest.approx((3 * 2 / 4 + 1 * 2 / 4) / 4)
    assert found["balanced_accuracy"] == pytest.approx((1 / 3 + 1) / 2)
    assert found["f1"] == pytest.approx(2 / 4)
    values = measure(Task("regression", (), "mae"), np.array([[1.0], [4.0]]), np.array([2.0, 2.0]))
    assert values == {"pearson": 0.0, "mae": 1.5}


def test_the_baseline_of_a_mean_error_is_the_median_of_the_labels() -> None:
    labels = np.array([0.0, 1.0, 5.0])
    found = assess(Task("regression", (), "mae"), np.array([[0.0], [1.0], [5.0]]), labels)
    assert (found.value, found.majority_baseline) == (0.0, pytest.approx(5 / 3))


@pytest.mark.parametrize(
    ("returned", "words"),
    [("good", "must return a number"), ({"a": None}, "must return a number"), (1 / 4, "")],
)
def test_a_metric_may_return_a_number_or_numbers_by_name(
    returned: object, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreign_functions, "own", lambda _: returned, raising=False)
    if not words:
        assert measure(task("foreign_functions:own"), LOGITS, LABELS)["own"] == returned
        return
    with pytest.raises(RunError, match=words):
        measure(task("foreign_functions:own"), LOGITS, LABELS)


def test_a_metric_that_fails_or_is_absent_is_named() -> None:
    with pytest.raises(RunError, match=r"foreign_functions:focal' failed on the outputs of 4 rows"):
        measure(task("foreign_functions:focal"), LOGITS, LABELS)
    with pytest.raises(ConfigError, match=r"data\.metric must be one of .*errors, rows, got 'auc'"):
        measure(task(PATH, decides="auc"), LOGITS, LABELS)
    with pytest.raises(ConfigError, match=r"'auc' does not measure data\.task = 'classification'"):
        DataConfig(metric="auc")
    assert DataConfig(metric="auc", metrics=(PATH,)).metric == "auc"


def test_outputs_that_are_not_finite_are_not_given_to_a_stranger_s_metric() -> None:
    found = measure(task("no_such_package:f", decides="auc"), LOGITS * np.nan, LABELS)
    assert set(map(np.isnan, found.values())) == {True}
    assert "auc" in found
