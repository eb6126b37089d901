"""Whole runs with bfloat16 weights, with shared ones, with recomputed blocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process_run import run
from safetensors import safe_open
from tiny import Silent, make_backbone, make_experiment, make_rows
from transformers import AutoModelForSequenceClassification

from fedpet.backbone.pretrained import load_for_task
from fedpet.config import Experiment
from fedpet.errors import ConfigError, PlanError
from fedpet.export.saved_run import export_run
from fedpet.protocol.plan import Plan
from fedpet.run.prepare import Prepared, prepare

WITH_MASK: dict[str, object] = {"strategy_num_rounds": 2, "mask_density": 0.1}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("large")
    return make_backbone(folder / "backbone"), make_rows(folder / "rows")


def _experiment(files: tuple[Path, Path], out: Path, **changes: object) -> Experiment:
    return make_experiment(*files, out, **{**WITH_MASK, **changes})


@pytest.mark.parametrize(
    "changes", [{}, {"training_gradient_checkpointing": True}, {"training_cls_only": True}]
)
def test_shared_weights_give_the_bits_of_weights_of_ones_own(
    files: tuple[Path, Path], tmp_path: Path, changes: dict[str, object]
) -> None:
    plain = run(_experiment(files, tmp_path / "plain", **changes))
    other = run(_experiment(files, tmp_path / "other", **changes, backbone_shared=True))
    assert other["final_values_sha256"] == plain["final_values_sha256"]
    assert other["quality"] == plain["quality"]
    models = [tmp_path / name / "model" / "model.safetensors" for name in ("plain", "other")]
    assert models[0].read_bytes() == models[1].read_bytes()


def test_recomputed_blocks_give_the_values_of_a_plain_run_up_to_rounding(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    values = []
    for on in (False, True):
        out = tmp_path / f"checkpointing-{on}"
        run(_experiment(files, out, training_gradient_checkpointing=on, training_optimizer="sgd"))
        values.append(np.load(out / "checkpoint" / "values.npy"))
    moved = np.linalg.norm(values[0])
    assert moved > 1e-3
    assert np.linalg.norm(values[1] - values[0]) < 1e-2 * moved


def test_a_run_in_bfloat16_learns_and_leaves_a_plain_model_of_that_type(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    results = []
    for shared in (False, True):
        out = tmp_path / f"shared-{shared}"
        changes = {"backbone_dtype": "bfloat16", "backbone_shared": shared}
        results.append(run(_experiment(files, out, **changes, strategy_num_rounds=4)))
        values = np.load(out / "checkpoint" / "values.npy")
        assert values.dtype == np.float32
        assert np.any(values != torch.from_numpy(values).bfloat16().float().numpy())
        with safe_open(out / "model" / "model.safetensors", framework="pt") as stored:
            names = list(stored.keys())
            assert {stored.get_tensor(name).dtype for name in names} == {torch.bfloat16}
    assert results[0]["final_values_sha256"] == results[1]["final_values_sha256"]
    by_round: list[Any] = results[0]["quality"]["by_round"]
    assert by_round[-1] != by_round[0]
    served = AutoModelForSequenceClassification.from_pretrained(out / "model", dtype=torch.bfloat16)
    export_run(out, tmp_path / "merged")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert again.dtype == torch.bfloat16
    for key, value in served.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def test_a_node_takes_the_type_of_weights_from_the_plan(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    experiment = _experiment(files, tmp_path / "out", backbone_dtype="bfloat16")
    prepared = prepare(experiment, Silent())
    assert isinstance(prepared, Prepared)
    plan = Plan.from_bytes(prepared.plan.to_bytes())
    own = replace(experiment.backbone, dtype="float32")
    backbone = load_for_task(plan.backbone(own), plan.task)
    assert backbone.model.dtype == torch.bfloat16
    assert plan.build(backbone).num_values == plan.num_values
    with pytest.raises(PlanError, match="start server and nodes from the same checkpoint"):
        plan.build(load_for_task(replace(plan.backbone(own), dtype="float32"), plan.task))


def test_a_plan_without_these_settings_is_written_as_before(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    prepared = prepare(_experiment(files, tmp_path / "out"), Silent())
    header = prepared.plan._header()
    assert b"dtype" not in header
    assert b"gradient_checkpointing" not in header
    assert Plan.from_bytes(prepared.plan.to_bytes()) == prepared.plan


def test_another_type_of_weights_is_refused_with_those_there_are(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"backbone.dtype must be one of float32, bfloat16"):
        _experiment(files, tmp_path / "out", backbone_dtype="float16")
