"""A table is worked off cell by cell, and goes on where it stopped; other settings are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from grid_jobs import Fake, job

from benchmarks.cell import Cell
from fedpet.config import Experiment
from fedpet.errors import ConfigError, RunError


def test_tuning_runs_every_rate_once_on_the_tuning_split_and_evaluates_at_the_end(
    table_file: Any,
) -> None:
    fake = Fake()
    job(table_file(), fake).complete(["tune"])
    assert fake.ran == [
        "tune/full-lr0.001",
        "tune/full-lr0.01",
        "tune/narrow-lr0.01",
        "tune/narrow-lr0.1",
    ]
    for cell in fake.cells:
        assert cell.experiment.data.eval_split == "validation"
        assert cell.experiment.strategy.evaluate_every == cell.experiment.strategy.num_rounds
        assert cell.experiment.run.seed == 3


def test_a_second_start_runs_only_what_is_missing(table_file: Any) -> None:
    path = table_file()
    first = Fake()
    job(path, first).complete(["tune"])
    victim = path.parent / "results" / "small" / "tune" / "narrow-lr0.1.json"
    victim.unlink()
    second = Fake()
    job(path, second).complete(["tune"])
    assert second.ran == ["tune/narrow-lr0.1"]


def test_a_cell_that_fails_leaves_no_file_and_the_others_stay(table_file: Any) -> None:
    def score(cell: Cell) -> float:
        if cell.name == "tune/full-lr0.01":
            raise RunError("the machine was switched off")
        return 0.5

    path = table_file()
    with pytest.raises(RunError):
        job(path, Fake(score)).complete(["tune"])
    there = [file.name for file in (path.parent / "results" / "small" / "tune").iterdir()]
    assert there == ["full-lr0.001.json"]


def test_a_cell_run_with_other_settings_is_refused_with_what_differs(table_file: Any) -> None:
    job(table_file(), Fake()).complete(["tune"])
    again = Fake()
    changed = table_file(set=["training.batch-size=16"])
    with pytest.raises(ConfigError, match=r"training\.batch-size was 4, is 16.*Remove"):
        job(changed, again).complete(["tune"])
    assert again.ran == []


def test_the_mask_is_a_setting_of_fedpets_cells_and_not_of_a_baselines(table_file: Any) -> None:
    job(table_file(), Fake()).complete(["tune"])
    changed = table_file(set=["mask.density=0.25"])
    grid = job(changed, Fake())
    full, narrow = grid.methods
    assert all(cell.read() is not None for cell in grid.tune_cells(full))
    with pytest.raises(ConfigError, match=r"mask\.density was 0\.05, is 0\.25"):
        grid.tune_cells(narrow)[0].read()


def test_another_cache_or_number_of_workers_is_no_other_setting(table_file: Any) -> None:
    job(table_file(), Fake()).complete(["tune"])
    again = Fake()
    job(table_file(set=["run.workers=7", "run.cache=elsewhere"]), again).complete(["tune"])
    assert again.ran == []


def test_a_key_that_a_stored_cell_did_not_know_had_its_default(table_file: Any) -> None:
    path = table_file()
    job(path, Fake()).complete(["tune"])
    file = path.parent / "results" / "small" / "tune" / "full-lr0.001.json"
    content = json.loads(file.read_text())
    default = Experiment().training.weight_decay
    assert content["settings"]["training"].pop("weight-decay") == default
    file.write_text(json.dumps(content))
    again = Fake()
    job(path, again).complete(["tune"])
    assert again.ran == []
    with pytest.raises(ConfigError, match="weight-decay"):
        job(table_file(set=["training.weight-decay=0.1"]), again).complete(["tune"])


def test_a_file_that_is_no_cell_is_refused(table_file: Any) -> None:
    path = table_file()
    file = path.parent / "results" / "small" / "tune" / "full-lr0.001.json"
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    with pytest.raises(ConfigError, match="no cell of a table"):
        job(path, Fake()).complete(["tune"])
