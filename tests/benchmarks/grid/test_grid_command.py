"""A cell in a process of its own, and the command: bad input, and a table of one cell on Ray."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from baseline_runs import run

from benchmarks.__main__ import main
from benchmarks.experiment_grid import ExperimentCell
from benchmarks.rate import Rate
from benchmarks.tables import read_grid
from fedpet.errors import RunError


def test_a_run_that_leaves_no_result_is_told_with_its_last_lines(
    table_file: Any, tmp_path: Path
) -> None:
    grid = read_grid(table_file())
    cell = grid.tune_cells(grid.methods[0])[0]
    assert isinstance(cell, ExperimentCell)
    broken = replace(cell.experiment, backbone=replace(cell.experiment.backbone, model="/nowhere"))
    with pytest.raises(RunError, match=r"(?s)exit code 2.*no folder '/nowhere'"):
        replace(cell, experiment=broken).run_in(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["run", "prefix"], "peft-lora"),
        (["run", "full", "absent"], "film-reviews"),
        (["run", "full", "--set", "mask.density=2"], "a fraction of the entries"),
        (["table", "absent.toml"], "no table file"),
        (["table", "absent.toml", "--phase", "last"], "structures, tune, final"),
        (["table"], "FILE"),
    ],
)
def test_bad_input_on_the_command_line_is_one_sentence_and_exit_code_2(
    arguments: list[str],
    word: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert word in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.simulation
@pytest.mark.timeout(320)
def test_a_table_of_one_cell_runs_on_ray_and_is_not_run_again(
    table_file: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = table_file(
        methods={"head": {"learning-rates": [0.1]}},
        set=["strategy.num-rounds=1", "run.workers=1"],
        final={"split": "test", "seeds": [0]},
    )
    command = ["benchmarks", "table", str(path), "--phase", "final"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match=r"^0$"):
        main()
    assert "head" in capsys.readouterr().out
    file = path.parent / "results" / "small" / "final" / "head-seed0.json"
    cell = json.loads(file.read_text())
    assert cell["result"]["run"]["status"] == "ok"
    assert cell["result"]["communication"]["messages"] == 8
    with pytest.raises(SystemExit, match=r"^0$"):
        main()
    assert "1 of 1 cells are there already" in capsys.readouterr().err

    # The same settings on a grid in this process: the same bytes.
    grid = read_grid(path)
    [again] = grid.final_cells(grid.methods[0])
    assert isinstance(again, ExperimentCell)
    assert again.rate == Rate(0.1)
    settings = again.experiment
    settings = replace(settings, run=replace(settings.run, out=str(path.parent / "here")))
    assert run("head", settings)["final_values_sha256"] == cell["result"]["final_values_sha256"]
