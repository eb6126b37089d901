"""The faster product of matrices is measured once, and a run has one."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from architectures import ARCHITECTURES, backbone
from in_process_run import run

from fedpet.config import Experiment, TrainingConfig
from fedpet.data import Rows
from fedpet.errors import ConfigError
from fedpet.pet.kernels import matmul_timing
from fedpet.pet.kernels.matmul import PRODUCTS
from fedpet.pet.kernels.matmul_timing import fastest_product, settle_product
from fedpet.run.federate import prepare
from fedpet.run.resume import read_cut_short
from fedpet.run.run_folder import new_run_folder
from fedpet.training import evaluation
from fedpet.training.evaluation import predict

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch carries no oneDNN"
)

Measured = Callable[..., list[Any]]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measured:
    """Says what is measured, and lists the measurements."""

    def say(torch_seconds: float, onednn_seconds: float) -> list[Any]:
        calls: list[Any] = []

        def measure(*args: Any) -> dict[str, float]:
            calls.append((*args, torch.get_num_threads()))
            return {"torch": torch_seconds, "onednn": onednn_seconds}

        monkeypatch.setattr(matmul_timing, "_measure", measure)
        return calls

    return say


def _fastest(cache: Path | None, **changes: Any) -> str:
    given: dict[str, Any] = {"tokens": 64, "backward": True, **changes}
    return fastest_product(given.pop("model", None) or backbone("bert").model, cache, **given)


def test_it_is_measured_once_for_a_machine(tmp_path: Path, measured: Measured) -> None:
    calls = measured(1.0, 0.5)
    assert [_fastest(tmp_path) for _ in range(3)] == ["onednn"] * 3
    assert len(calls) == 1
    (file,) = (tmp_path / "matmul").iterdir()
    stored = json.loads(file.read_text())
    assert stored["torch"] == torch.__version__
    assert stored["seconds"] == {"torch": 1.0, "onednn": 0.5}


def test_a_real_measurement_answers_by_name_and_leaves_threads_alone(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    assert _fastest(tmp_path, threads=before + 1) in PRODUCTS
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(("seconds", "found"), [(0.5, "onednn"), (0.95, "torch"), (2.0, "torch")])
def test_a_near_tie_goes_to_torch(
    tmp_path: Path, measured: Measured, seconds: float, found: str
) -> None:
    measured(1.0, seconds)
    assert _fastest(tmp_path) == found


def test_another_machine_torch_model_or_number_of_threads_is_measured_anew(
    tmp_path: Path, measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = measured(1.0, 0.5)
    _fastest(tmp_path)
    _fastest(tmp_path, threads=5)
    _fastest(tmp_path, tokens=65)
    _fastest(tmp_path, backward=False)
    _fastest(tmp_path, model=backbone("t5").model)
    with monkeypatch.context() as patch:
        patch.setattr(matmul_timing, "processor_type", lambda: "another")
        _fastest(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "0.0")
        _fastest(tmp_path)
    assert len(calls) == 7
    assert calls[1][-1] == 5  # threads


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"seconds": {"torch": 1}}'])
def test_a_damaged_answer_is_measured_anew(tmp_path: Path, measured: Measured, damage: str) -> None:
    calls = measured(1.0, 0.5)
    _fastest(tmp_path)
    (file,) = (tmp_path / "matmul").iterdir()
    file.write_text(damage)
    assert [_fastest(tmp_path), _fastest(tmp_path)] == ["onednn"] * 2
    assert len(calls) == 2


def test_a_cache_that_takes_no_file_is_done_without(tmp_path: Path, measured: Measured) -> None:
    calls = measured(1.0, 0.5)
    (tmp_path / "matmul").write_text("in the way")
    assert [_fastest(tmp_path), _fastest(None)] == ["onednn"] * 2
    assert len(calls) == 2


def test_in_another_precision_nothing_is_measured(tmp_path: Path, measured: Measured) -> None:
    calls = measured(1.0, 0.5)
    assert _fastest(tmp_path, model=backbone("bert").model.to(torch.bfloat16)) == "torch"
    assert not calls


def test_a_named_product_is_not_measured(tmp_path: Path, measured: Measured) -> None:
    calls = measured(1.0, 0.5)
    named = TrainingConfig(matmul_backend="torch")
    assert settle_product(named, backbone("bert").model, tmp_path) is named
    with pytest.raises(ConfigError, match=r"training\.matmul-backend must be one of"):
        TrainingConfig(matmul_backend="fast")
    assert not calls


def _experiment(
    files: tuple[Path, Path], out: Path, product: str, dtype: str = "float32"
) -> Experiment:
    return tiny.make_experiment(
        *files, out, training_matmul_backend=product, run_evaluation_dtype=dtype
    )


def test_a_run_has_one_product_and_is_that_products_run(
    files: tuple[Path, Path], tmp_path: Path, measured: Measured
) -> None:
    measured(1.0, 0.5)
    experiment = _experiment(files, tmp_path / "auto", "auto")
    found = run(experiment)
    named = run(_experiment(files, tmp_path / "named", "onednn"))
    assert found["final_values_sha256"] == named["final_values_sha256"]
    assert found["run"]["plan_digest"] == named["run"]["plan_digest"]
    (written,) = (tmp_path / "auto").rglob("config.toml")
    assert tomllib.loads(written.read_text())["training"]["matmul-backend"] == "onednn"


def test_a_run_goes_on_with_the_product_it_began_with(
    files: tuple[Path, Path], tmp_path: Path, measured: Measured
) -> None:
    measured(1.0, 0.5)
    prepared = prepare(_experiment(files, tmp_path / "run", "auto"), tiny.Silent())
    folder = new_run_folder(prepared.experiment)
    folder.write_inputs(prepared.experiment, prepared.plan)
    calls = measured(1.0, 2.0)  # on a machine where torch is faster
    again = prepare(read_cut_short(folder.path), tiny.Silent())
    assert again.plan.training.matmul_backend == "onednn"
    assert again.plan.to_bytes() == prepared.plan.to_bytes()
    assert not calls


def _rows() -> Rows:
    generator = np.random.default_rng(0)
    lengths = generator.integers(3, 12, size=24)
    tokens = generator.integers(5, 60, size=lengths.sum()).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Rows(tokens, offsets, generator.integers(0, 2, size=24), None, pad_id=0)


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n != "vit" and n[:2] != "t5"])
def test_an_evaluation_by_another_product_gives_the_same_logits(name: str) -> None:
    model, rows = backbone(name).model, _rows()
    found = predict(model, rows, product="onednn")
    np.testing.assert_allclose(found, predict(model, rows), rtol=1e-5, atol=1e-5)


def test_evaluations_that_take_long_are_multiplied_by_what_is_faster(
    files: tuple[Path, Path], tmp_path: Path, measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, taken = measured(1.0, 0.5), []
    plain = evaluation.predict

    def watched(*args: Any, **options: Any) -> Any:
        taken.append(options["product"])
        return plain(*args, **options)

    monkeypatch.setattr(evaluation, "predict", watched)
    short = run(_experiment(files, tmp_path / "short", "torch"))
    assert {*taken} == {"torch"}
    assert not calls
    taken.clear()
    monkeypatch.setattr(evaluation, "_WORTH_MEASURING", 0)
    long = run(_experiment(files, tmp_path / "long", "torch"))
    assert {*taken} == {"onednn"}
    assert long["final_values_sha256"] == short["final_values_sha256"]


def test_an_evaluation_in_bfloat16_is_told_and_leaves_the_values_alone(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    found, plain = (
        run(_experiment(files, tmp_path / dtype, "torch", dtype))
        for dtype in ("bfloat16", "float32")
    )
    assert (found["quality"]["dtype"], plain["quality"]["dtype"]) == ("bfloat16", "float32")
    assert any("run.evaluation-dtype" in line for line in found["quality"]["warnings"])
    assert not any("run.evaluation-dtype" in line for line in plain["quality"]["warnings"])
    assert found["final_values_sha256"] == plain["final_values_sha256"]
    with pytest.raises(ConfigError, match=r"run.evaluation-dtype"):
        _experiment(files, tmp_path / "x", "torch", "float16")


def test_logits_in_bfloat16_are_near_those_in_float32() -> None:
    model, rows = backbone("bert").model, _rows()
    plain, half = predict(model, rows), predict(model, rows, dtype="bfloat16")
    assert half.dtype == np.float32
    assert 0 < np.abs(half - plain).max() < 0.05 * np.abs(plain).max()
