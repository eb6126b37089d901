"""A run says what its metric must be above, and warns of what it learned badly or not at all."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import in_process_run
import numpy as np
import pytest
import torch
from tiny import Silent, make_experiment

from fedpet.config import Experiment
from fedpet.data import Task
from fedpet.errors import RunError
from fedpet.protocol.ledger import RoundRecord
from fedpet.run import run_state
from fedpet.run.quality import quality_of, status_of
from fedpet.training.metrics import Assessment, assess

TASK = Task("classification", ("bad", "good", "odd"), "accuracy")
REGRESSION = Task("regression", (), "pearson")
GOOD = Assessment(0.8, 0.5, "good", {"bad": 0.4, "good": 0.6}, is_constant=False)


# What outputs are compared with


def logits_of(predictions: list[int]) -> np.ndarray:
    return np.eye(3, dtype=np.float32)[predictions]


@pytest.mark.parametrize(
    ("metric", "labels", "baseline"),
    [
        ("accuracy", [1, 1, 1, 0, 2], 3 / 5),
        ("f1", [1, 1, 1, 0, 2], (2 * 3 / 8 + 0 + 0) / 3),
        ("matthews", [1, 1, 1, 0, 2], 0.0),
        ("accuracy", [2, 0, 2, 0], 2 / 4),
    ],
)
def test_the_majority_baseline_is_the_metric_of_the_most_frequent_class_alone(
    metric: str, labels: list[int], baseline: float
) -> None:
    found = assess(replace(TASK, metric=metric), logits_of([0] * len(labels)), np.array(labels))
    assert found.majority_baseline == pytest.approx(baseline)
    assert found.majority_class == ("good" if labels[0] == 1 else "bad")


def test_binary_f1_of_the_majority_is_0_unless_the_majority_is_class_1() -> None:
    two = Task("classification", ("no", "yes"), "f1")
    for labels, baseline in (([0, 0, 1], 0.0), ([1, 1, 0], 2 * 2 / 5)):
        found = assess(two, np.eye(2)[[0, 1, 0]], np.array(labels))
        assert found.majority_baseline == pytest.approx(baseline)


def test_predictions_are_counted_by_class_and_one_class_alone_is_seen() -> None:
    labels = np.array([0, 1, 2, 1])
    found = assess(TASK, logits_of([1, 1, 0, 1]), labels)
    assert dict(found.predicted) == {"bad": 0.25, "good": 0.75, "odd": 0.0}
    assert not found.is_constant
    assert assess(TASK, logits_of([2, 2, 2, 2]), labels).is_constant
    assert not assess(TASK, logits_of([2]), np.array([0])).is_constant  # one row tells nothing


def test_a_regression_s_baseline_is_a_correlation_of_0_and_a_constant_is_seen() -> None:
    labels = np.array([1.0, 2.0, 4.0], dtype=np.float32)
    found = assess(REGRESSION, labels[:, None], labels)
    assert (found.value, found.majority_baseline, found.is_constant) == (1.0, 0.0, False)
    assert assess(REGRESSION, np.full((3, 1), 0.3, np.float32), labels).is_constant


def test_outputs_that_are_not_finite_predict_nothing() -> None:
    logits = logits_of([0, 1])
    logits[0, 0] = np.nan
    found = assess(TASK, logits, np.array([0, 1]))
    assert math.isnan(found.value)
    assert found.predicted == {}
    assert not found.is_constant
    assert found.majority_baseline == 0.5


# Warnings


def records(
    metrics: list[float | None], losses: list[float], *, aggregated: bool = True
) -> list[RoundRecord]:
    first = RoundRecord(0, metric=metrics[0])
    return [
        first,
        *(
            RoundRecord(number, metric=metric, loss=loss, aggregated=aggregated)
            for number, (metric, loss) in enumerate(zip(metrics[1:], losses, strict=True), 1)
        ),
    ]


def quality(
    final: Assessment,
    metrics: list[float | None],
    losses: list[float],
    experiment: Experiment | None = None,
    **changes: Any,
) -> dict[str, Any]:
    given = {"metric": "accuracy", "num_rows": 872, **changes}
    experiment = experiment or Experiment.from_tables({"training": {"learning-rate": 0.001}})
    return quality_of(experiment, records(metrics, losses), final, **given)


def test_a_run_that_learned_warns_of_nothing() -> None:
    found = quality(GOOD, [0.5, 0.6, 0.8], [0.7, 0.6])
    assert found["warnings"] == []
    assert (found["before"], found["final"], found["best"]) == (0.5, 0.8, 0.8)
    assert found["majority_baseline"] == 0.5
    assert found["majority_class"] == "good"
    assert found["predicted"] == {"bad": 0.4, "good": 0.6}
    assert found["loss_by_round"] == [{"round": 1, "value": 0.7}, {"round": 2, "value": 0.6}]


COLLAPSED = replace(GOOD, value=0.5, predicted={"bad": 0.0, "good": 1.0}, is_constant=True)


@pytest.mark.parametrize(
    ("final", "metrics", "losses", "warning"),
    [
        (COLLAPSED, [0.4, 0.5], [0.7], "predicts the class 'good' alone for all 872 evaluation"),
        (
            replace(GOOD, predicted={}, is_constant=True),
            [0.4, 0.8],
            [0.7],
            "predicts the same value for all 872",
        ),
        (GOOD, [0.9, 0.8], [0.7], "accuracy fell from 0.9000 before training to 0.8000"),
        (GOOD, [0.5, 0.7, 0.8], [0.7, 0.9], "rose from 0.7 in round 1 to 0.9 in round 2"),
        (replace(GOOD, value=0.5), [0.4, 0.5], [0.7], "0.5000 is not above the majority baseline"),
        (
            Assessment(-0.1, 0.0, "", {}, is_constant=False),
            [None, -0.1],
            [0.7],
            "is not above the majority baseline 0.0000, which answers one value",
        ),
        (replace(GOOD, value=math.nan), [0.5, math.nan], [0.7], "the final accuracy is NaN"),
        (GOOD, [0.5, math.nan, 0.8], [0.7, 0.6], "was NaN at 1 of 2 evaluations"),
    ],
)
def test_each_sign_of_a_run_that_went_wrong_is_warned_of_with_what_to_try(
    final: Assessment, metrics: list[float | None], losses: list[float], warning: str
) -> None:
    found = quality(final, metrics, losses)
    (told,) = [text for text in found["warnings"] if warning in text]
    assert "try lower rates (training.learning-rate = 0.001" in told


def test_a_warning_names_the_rates_that_the_run_had() -> None:
    experiment = Experiment.from_tables(
        {
            "training": {"learning-rates": ["mask=0.2", "head=0.1"]},
            "strategy": {"name": "fedadam", "server-learning-rate": 0.5},
        }
    )
    (warning,) = quality(GOOD, [0.9, 0.8], [0.7], experiment)["warnings"]
    assert "training.learning-rates = ['mask=0.2', 'head=0.1']" in warning
    assert "strategy.server-learning-rate = 0.5" in warning


def test_a_rate_of_a_kind_that_the_run_does_not_train_is_told() -> None:
    experiment = Experiment.from_tables({"training": {"learning-rates": ["lora=0.2", "head=0.1"]}})
    found = quality(GOOD, [0.5, 0.8], [0.7], experiment, trained_kinds=["mask", "head"])
    (warning,) = found["warnings"]
    assert "names 'lora', of which this run trains nothing (mask, head are trained)" in warning
    assert quality(GOOD, [0.5, 0.8], [0.7], experiment)["warnings"] == []  # a baseline's


def test_a_run_that_averaged_nothing_is_told_by_its_status_alone() -> None:
    rounds = records([0.5, 0.5], [0.7], aggregated=False)
    assert status_of(rounds, COLLAPSED) == "nothing learned"
    found = quality_of(Experiment(), rounds, COLLAPSED, metric="accuracy", num_rows=9)
    assert found["warnings"] == []


def test_the_best_metric_is_the_best_of_those_that_are_numbers() -> None:
    for metrics in ([0.5, math.nan, 0.7, 0.6], [0.5, 0.7, math.nan, 0.6]):
        assert quality(replace(GOOD, value=0.6), metrics, [0.7] * 3)["best"] == 0.7


# Whole runs


def test_a_run_that_collapses_at_a_rate_that_is_too_high_says_so(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    experiment = make_experiment(*files, tmp_path / "run", training_learning_rate=30.0)
    result = in_process_run.run(experiment)
    quality = result["quality"]
    assert max(quality["predicted"].values()) == 1.0
    assert any("alone for all 40 evaluation rows" in text for text in quality["warnings"])
    assert quality["final"] <= quality["majority_baseline"]
    lines = (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    assert quality["loss_by_round"] == [
        {"round": line["round"], "value": line["loss"]} for line in told if line["aggregated"]
    ]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["quality"] == quality


def test_a_run_whose_outputs_end_not_finite_has_diverged_and_fails(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(model: torch.nn.Module, rows: Any, task: Task, **how: Any) -> Assessment:
        labels = np.asarray(rows.labels)
        return assess(task, np.full((len(labels), task.num_outputs), np.nan), labels)

    monkeypatch.setattr(run_state, "assess_rows", spoiled)
    with pytest.raises(RunError, match=r"the run diverged: the final accuracy is NaN.*lower rates"):
        in_process_run.run(make_experiment(*files, tmp_path / "run"))

    def no_number(text: str) -> float:
        raise AssertionError(f"{text} is no JSON")

    text = (tmp_path / "run" / "result.json").read_text()
    result = json.loads(text, parse_constant=no_number)
    assert result["run"]["status"] == "diverged"
    assert result["quality"]["final"] is None
    assert (tmp_path / "run" / "model" / "config.json").exists()


def test_a_run_taken_up_after_its_last_round_assesses_its_final_model(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    from fedpet.client.node_config import NodeConfig
    from fedpet.run.checkpoint_file import read_journal
    from fedpet.run.federate import federate, prepare
    from fedpet.run.local_grid import LocalGrid
    from fedpet.run.run_folder import RunFolder, new_run_folder

    experiment = make_experiment(*files, tmp_path / "run")
    grid = LocalGrid.of(NodeConfig.from_experiment(experiment), 1)

    class Stops(Silent):
        def on_stage(self, text: str) -> None:
            if text == "writing the plain model":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        federate(grid, prepare(experiment, Silent()), new_run_folder(experiment), Stops())
    out = RunFolder(tmp_path / "run")
    journal = read_journal(out.path)
    assert journal is not None
    resumed = federate(grid, prepare(experiment, Silent()), out, Silent(), journal)
    whole = in_process_run.run(
        replace(experiment, run=replace(experiment.run, out=str(tmp_path / "whole")))
    )
    assert resumed["quality"] == whole["quality"]
    assert resumed["final_values_sha256"] == whole["final_values_sha256"]
