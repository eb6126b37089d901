"""What `fedpet estimate` tells of recorded runs of the real model is what their ledgers say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from simulations.benchmarks.estimates import RESULTS, deviations, recorded

CELLS = {name: (experiment, books) for name, experiment, books in recorded(RESULTS)}


def test_there_are_recorded_runs_to_be_held_against() -> None:
    assert {"default/final/fedpet-seed0", "default/tune/fedpet-lr0.01-mask0.002"} <= CELLS.keys()


def test_files_beside_the_cells_are_none(tmp_path: Path) -> None:
    (tmp_path / "checks.json").write_text("[]", encoding="utf-8")
    (tmp_path / "other.json").write_text('{"runs": "full"}', encoding="utf-8")
    assert list(recorded(tmp_path)) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", CELLS)
def test_an_estimate_of_a_recorded_run_is_within_1_percent_of_its_ledger(
    name: str, tmp_path: Path
) -> None:
    experiment, books = CELLS[name]
    settings = replace(experiment, run=replace(experiment.run, cache=str(tmp_path)))
    assert abs(deviations(settings, books)["total_bytes"]) <= 0.01
