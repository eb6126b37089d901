"""Test `fedpet estimate` against the ledgers of recorded runs of the real model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.estimates import RESULTS, deviations, has_its_data, recorded

# Those on bank customers' intents want their data; see simulations/experiments/banking77.toml.
CELLS = {
    name: (experiment, books)
    for name, experiment, books in recorded(RESULTS)
    if has_its_data(experiment)
}
CODECS = ("bfloat16", "int8", "int4", "eden-4", "eden-1", "eden-4-values", "topk-feedback")


def off(name: str, cache: Path) -> dict[str, float]:
    experiment, books = CELLS[name]
    settings = replace(experiment, run=replace(experiment.run, cache=str(cache)))
    return deviations(settings, books)


def test_there_are_recorded_runs_to_be_held_against() -> None:
    assert {"default/final/fedpet-seed0", "default/tune/fedpet-lr0.01-mask0.002"} <= CELLS.keys()
    assert {f"codecs/final/{codec}-seed{seed}" for codec in CODECS for seed in range(3)} <= {*CELLS}


@pytest.mark.parametrize(
    "name", ["default/final/fedpet-seed0", "recommended/final/fedpet-coded-seed0"]
)
def test_an_estimate_is_within_1_percent_of_its_ledger(name: str, tmp_path: Path) -> None:
    assert abs(off(name, tmp_path)["total_bytes"]) <= 0.01


def test_files_beside_the_cells_are_none(tmp_path: Path) -> None:
    (tmp_path / "checks.json").write_text("[]", encoding="utf-8")
    (tmp_path / "other.json").write_text('{"runs": "full"}', encoding="utf-8")
    assert list(recorded(tmp_path)) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", CELLS)
def test_an_estimate_of_a_recorded_run_is_as_near_its_ledger_as_it_says(
    name: str, tmp_path: Path
) -> None:
    found = off(name, tmp_path)
    assert abs(found["total_bytes"]) <= found["tolerance"]
    codec = CELLS[name][0].codec
    assert found["tolerance"] == pytest.approx(
        0.05 if "int" in codec.uplink or "topk" in codec.uplink else 0.01
    )
