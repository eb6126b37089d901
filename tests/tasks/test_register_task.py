"""A task of one's own runs by its name or its import path; a name that is none is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from in_process_run import run
from language_models import experiment_of, make_rows, save_model

from fedpet import register_task
from fedpet.config import DataConfig
from fedpet.errors import ConfigError
from fedpet.protocol.plan import Plan
from fedpet.tasks import TASKS, TaskKind, kind_of
from fedpet.training.metrics import greater_is_better

PATH = "foreign_tasks:EverySecondWord"


@pytest.mark.parametrize("name", [PATH, "every-second-word"])
def test_a_task_of_one_s_own_is_trained_measured_and_sent_by_its_import_path(
    name: str, tmp_path: Path
) -> None:
    import foreign_tasks

    backbone = save_model(tmp_path / "model")
    settings = experiment_of(
        backbone, make_rows(tmp_path / "rows"), tmp_path / "run", data_task=name,
        data_metric="misses",
    )  # fmt: skip
    result = run(settings)
    quality = result["quality"]
    tokens = result["data"]["evaluation_label_tokens"]
    assert quality["final"] == tokens * (1 - quality["metrics"]["token_accuracy"])
    assert quality["best"] == min(point["value"] for point in quality["by_round"][1:])
    plan = Plan.from_bytes((tmp_path / "run" / "plan.bin").read_bytes())
    assert plan.task.kind == PATH
    assert isinstance(kind_of(plan.task), foreign_tasks.EverySecondWord)
    assert not greater_is_better("misses")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("language-modeling", r"data\.task must be one of .*Did you mean 'language-modelling'"),
        ("os:system", "is no task: put @fedpet.register_task"),
        ("foreign_tasks:absent", "cannot be imported here"),
    ],
)
def test_what_is_no_task_is_refused(name: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        DataConfig(task=name, metric="perplexity")


def test_a_name_belongs_to_one_task() -> None:
    with pytest.raises(ConfigError, match="'instruction' is fedpet"):

        @register_task("instruction")
        class Other(TaskKind):
            pass


def test_every_task_names_metrics_and_a_class_of_transformers() -> None:
    import transformers

    for kind in TASKS:
        assert kind.metrics
        assert kind.lower_is_better <= {*kind.metrics, *kind.written_metrics}
        assert hasattr(transformers, kind.model_class)
    assert {"classification", "regression"} <= set(TASKS.names)
    far = np.array([1e9]), np.zeros(1), np.ones(1)
    assert np.isfinite(kind_of("instruction").metrics["perplexity"](*far))
