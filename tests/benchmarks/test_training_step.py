"""The table of steps compares like with like: oneDNN changes no method but for its time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from architectures import backbone, batch, loss_of
from torch import Tensor

from benchmarks.step_methods import FIRST_TOKEN, ONEDNN, methods
from benchmarks.training_step import FLOOR, LEAST_ROUNDS, main


def _step(method: str) -> tuple[Tensor, Tensor]:
    """Logits, and the gradients of all that is trained."""
    base = backbone("bert")
    torch.manual_seed(0)
    model, parameters, zero, _ = methods()[method](base)
    parameters = list(parameters)
    with torch.no_grad():  # off zero, where a product with a factor of zeros would hide
        for parameter in parameters:
            parameter.add_(0.05 * torch.randn_like(parameter))
    zero()
    inputs = batch("bert")
    loss_of(model, inputs).backward()
    gradients = [p.grad.flatten() for p in parameters if p.grad is not None]
    return model(**inputs).logits.detach(), torch.cat(gradients)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`", "ignore:Sparse")  # peft's
@pytest.mark.parametrize("method", [name for name in methods() if name.endswith(ONEDNN)])
def test_products_by_onednn_change_no_method(method: str) -> None:
    plain, onednn_matmul = _step(method.removesuffix(ONEDNN)), _step(method)
    for one, other in zip(plain, onednn_matmul, strict=True):
        assert len(one) == len(other) > 0
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5 * float(one.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_floor_steps_with_both_kinds_of_products_and_is_told_once(
    tmp_path: Path, processes: int
) -> None:
    """A real run of processes in turns, on one short row."""
    names = [f"fedpet-mask-0.5%{FIRST_TOKEN}", f"bitfit{ONEDNN}", FLOOR]
    out = tmp_path / "steps.json"
    few = ["--settings", "minilm:1x8", "--threads", "1", "--minutes", "0", "--out", str(out)]
    main([*few, "--processes", str(processes), "--methods", *names])
    rows = {row["method"]: row for row in json.loads(out.read_text())["rows"]}
    assert sorted(rows) == sorted(names)
    assert rows[FLOOR]["of_floor"] == 1
    assert all(
        row["rounds"] >= processes * LEAST_ROUNDS and 0.1 < row["of_floor"] < 10
        for row in rows.values()
    )
    assert rows[names[0]]["trained_values"] > rows[FLOOR]["trained_values"]
    assert all(row["peak_bytes"] > 0 < row["persistent_bytes"] for row in rows.values())
