"""The table of language model steps, rehearsed on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fake_gpu import second_device

from benchmarks import language_step
from benchmarks.language_methods import FLOOR, VARIANTS, Trainer, batch_of, load_once

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`", "ignore:Sparse")
TINY = ["--model", "tiny", "--shapes", "2x8", "--rounds", "3"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_methods_begin_at_one_loss_and_lower_it(dtype: str) -> None:
    ids = batch_of("tiny", 2, 8, "cpu")
    firsts = []
    for name, variant in VARIANTS.items():
        trainer = Trainer(variant, "tiny", dtype, "cpu")
        for group in trainer._optimizer.param_groups:
            group["lr"] = 0.05
        losses = [trainer.step(ids) for _ in range(6)]
        assert losses[-1] < losses[0], name
        firsts.append(losses[0])
    assert firsts == pytest.approx(
        [firsts[0]] * len(firsts), rel=1e-3 if dtype != "float32" else 1e-5
    )


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("fedpet")])
def test_a_step_puts_nothing_on_another_device(name: str) -> None:
    load_once("tiny", "bfloat16", VARIANTS[name])
    with second_device() as device:
        trainer = Trainer(VARIANTS[name], "tiny", "bfloat16", str(device))
        trainer.step(batch_of("tiny", 2, 8, str(device)))
    assert trainer.moment_bytes > 0


def test_findings_are_written_as_they_are_made_and_not_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "steps.json"
    few = [*TINY, "--dtypes", "float32", "--methods", "fedpet-mask", "--out", str(out)]
    language_step.main([*few, "--only", "time"])
    cells = json.loads(out.read_text())["cells"]
    assert cells.keys() == {f"float32 2x8 {name}: time" for name in (FLOOR, "fedpet-mask")}
    assert cells[f"float32 2x8 {FLOOR}: time"]["of_floor"] == 1
    assert all(cell["rounds"] == 2 and cell["seconds"] > 0 for cell in cells.values())
    monkeypatch.setattr(language_step, "times", None)
    monkeypatch.setattr(
        language_step, "_memory_apart", lambda *_: {"held_bytes": 1e6, "peak_bytes": 2e6}
    )
    language_step.main(few)
    assert capsys.readouterr().out.splitlines()[-1].endswith("| 3 |")
    with pytest.raises(SystemExit, match="another model"):
        language_step.main([*few, "--model", "smollm2"])


def test_memory_is_that_of_tensors_and_of_the_process() -> None:
    torch.set_num_threads(1)
    found = {
        name: language_step.memory(name, "tiny", "float32", "8x64", "cpu")
        for name in ("full", "fedpet-mask, all logits")
    }
    values = found["full"], found["fedpet-mask, all logits"]
    assert values[0]["held_bytes"] >= 2 * 94_528 * 4 > values[1]["held_bytes"] > 0
    logits = 8 * 64 * 512 * 4
    assert all(one["peak_bytes"] > 2 * logits for one in values)
