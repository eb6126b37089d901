"""The table of methods is worked off cell by cell, resumed and checked, and never bent."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import tomli_w
from baseline_runs import run
from report_runs import make_result, to_text

from fedpet.config import Experiment
from fedpet.errors import ConfigError, RunError
from simulations.benchmarks import table
from simulations.benchmarks.__main__ import main, tuning_table
from simulations.benchmarks.baselines import METHODS
from simulations.benchmarks.table import Cell, Rate, TableFile, TableRun, read_cell

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    rows = tiny.make_rows(folder / "rows")
    shutil.copy(rows / "test.jsonl", rows / "validation.jsonl")
    return tiny.make_backbone(folder / "backbone"), rows


# -- the table file ------------------------------------------------------------------------------


@pytest.fixture
def table_file(experiment: Any, tmp_path: Path) -> Callable[..., Path]:
    tables = experiment().to_tables()
    tables["run"]["out"] = ""
    (tmp_path / "tiny.toml").write_text(tomli_w.dumps(tables), encoding="utf-8")

    def write(**changes: Any) -> Path:
        content = {
            "experiment": "tiny.toml",
            "tune": {"split": "validation", "seed": 3},
            "final": {"split": "test", "seeds": [0, 1]},
            "methods": {
                "full": {"learning-rates": [0.001, 0.01]},
                "narrow": {"runs": "fedpet", "learning-rates": [0.01, 0.1], "set": []},
            },
            **changes,
        }
        path = tmp_path / "small.toml"
        path.write_text(tomli_w.dumps(content), encoding="utf-8")
        return path

    return write


class Fake:
    """Stands in for a run: counts them, and gives the metric that `score` says."""

    def __init__(self, score: Callable[[Cell], float] = lambda cell: 0.5) -> None:
        self.ran: list[str] = []
        self.cells: list[Cell] = []
        self._score = score

    def __call__(self, cell: Cell, folder: Path) -> dict[str, Any]:
        self.ran.append(cell.name)
        self.cells.append(cell)
        seed, final = cell.experiment.run.seed, self._score(cell)
        result = make_result(method=cell.method.runs, seed=seed, final=max(final, 0.0))
        if math.isnan(final):
            result["run"]["status"] = "nothing learned"
        return result


def job(path: Path, fake: Fake, **kwargs: Any) -> TableRun:
    return TableRun(TableFile.read(path), lambda line: None, fake, **kwargs)


def test_the_shipped_table_compares_the_three_baselines_and_fedpet_over_equal_grids() -> None:
    shipped = TableFile.read(REPOSITORY / "simulations" / "benchmarks" / "default.toml")
    assert {method.runs for method in shipped.methods} == {*METHODS, "fedpet"}
    assert len({len(method.rates) for method in shipped.methods}) == 1
    assert shipped.final_seeds == (0, 1, 2)
    assert shipped.tune_seed not in shipped.final_seeds
    for method in shipped.methods:
        for cell in shipped.tune_cells(method):
            assert cell.experiment.data.eval_split == "validation"
        for cell in shipped.final_cells(method, method.rates[0]):
            assert cell.experiment.data.eval_split == "test"


def test_grids_of_different_sizes_are_refused_with_the_sizes(table_file: Any) -> None:
    methods = {"full": {"learning-rates": [0.1, 0.2]}, "head": {"learning-rates": [0.1]}}
    with pytest.raises(ConfigError, match=r"grids of the same size.*'full': 2, 'head': 1"):
        TableFile.read(table_file(methods=methods))


def test_tuning_on_the_rows_that_are_reported_is_refused(table_file: Any) -> None:
    with pytest.raises(ConfigError, match="no result is reported on"):
        TableFile.read(table_file(tune={"split": "test", "seed": 3}))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"seeds": [1]}, "unknown key 'seeds'"),
        ({"tune": {"split": "validation"}}, "lacks the key 'seed'"),
        ({"methods": {}}, r"\[methods.NAME\]"),
        ({"methods": {"adapter": {"learning-rates": [1]}}}, "peft-lora"),
        ({"methods": {"full": {"learning-rates": [0]}}}, "learning rates such as 0.001"),
        ({"methods": {"full": {"learning-rates": [True]}}}, "learning rates such as 0.001"),
        ({"methods": {"full": {"learning-rates": ["0.1 head"]}}}, "0.001 head=0.01"),
        ({"methods": {"full": {"learning-rates": [0.1, 0.1]}}}, "distinct"),
        ({"methods": {"full": {"rates": [0.1]}}}, "lacks the key 'learning-rates'"),
        ({"final": {"split": "test", "seeds": ["a"]}}, "whole numbers"),
        ({"experiment": "absent"}, "film-reviews"),
    ],
)
def test_a_wrong_table_file_is_refused_in_one_sentence(
    table_file: Any, changes: dict[str, Any], word: str
) -> None:
    with pytest.raises(ConfigError, match=word):
        TableFile.read(table_file(**changes))


def test_a_rate_may_name_kinds_of_module(table_file: Any) -> None:
    methods = {"full": {"learning-rates": ["0.001 head=0.1", 0.01]}}
    read = TableFile.read(table_file(methods=methods))
    first, second = read.tune_cells(read.methods[0])
    assert first.experiment.training.rate_of("head") == 0.1
    assert first.experiment.training.rate_of("full") == 0.001
    assert second.experiment.training.rate_of("head") == 0.01
    assert first.name == "tune/full-lr0.001-head0.1"


# -- its cells -----------------------------------------------------------------------------------


def test_tuning_runs_every_rate_once_on_the_tuning_split_and_evaluates_at_the_end(
    table_file: Any,
) -> None:
    fake = Fake()
    job(table_file(), fake).tune()
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
    job(path, first).tune()
    victim = path.parent / "results" / "small" / "tune" / "narrow-lr0.1.json"
    victim.unlink()
    second = Fake()
    job(path, second).tune()
    assert second.ran == ["tune/narrow-lr0.1"]


def test_a_cell_that_fails_leaves_no_file_and_the_others_stay(table_file: Any) -> None:
    def score(cell: Cell) -> float:
        if cell.name == "tune/full-lr0.01":
            raise RunError("the machine was switched off")
        return 0.5

    path = table_file()
    with pytest.raises(RunError):
        job(path, Fake(score)).tune()
    there = [file.name for file in (path.parent / "results" / "small" / "tune").iterdir()]
    assert there == ["full-lr0.001.json"]


def test_a_cell_run_with_other_settings_is_refused_with_what_differs(table_file: Any) -> None:
    job(table_file(), Fake()).tune()
    again = Fake()
    changed = table_file(set=["training.batch-size=16"])
    with pytest.raises(ConfigError, match=r"training\.batch-size was 4, is 16.*Remove"):
        job(changed, again).tune()
    assert again.ran == []


def test_the_mask_is_a_setting_of_fedpets_cells_and_not_of_a_baselines(table_file: Any) -> None:
    job(table_file(), Fake()).tune()
    changed = table_file(set=["mask.density=0.25"])
    read = TableFile.read(changed)
    full, narrow = read.methods
    assert all(read_cell(cell) is not None for cell in read.tune_cells(full))
    with pytest.raises(ConfigError, match=r"mask\.density was 0\.05, is 0\.25"):
        read_cell(read.tune_cells(narrow)[0])


def test_another_cache_or_number_of_workers_is_no_other_setting(table_file: Any) -> None:
    job(table_file(), Fake()).tune()
    again = Fake()
    job(table_file(set=["run.workers=7", "run.cache=elsewhere"]), again).tune()
    assert again.ran == []


def test_a_key_that_a_stored_cell_did_not_know_had_its_default(table_file: Any) -> None:
    path = table_file()
    job(path, Fake()).tune()
    file = path.parent / "results" / "small" / "tune" / "full-lr0.001.json"
    content = json.loads(file.read_text())
    default = Experiment().training.weight_decay
    assert content["settings"]["training"].pop("weight-decay") == default
    file.write_text(json.dumps(content))
    again = Fake()
    job(path, again).tune()
    assert again.ran == []
    with pytest.raises(ConfigError, match="weight-decay"):
        job(table_file(set=["training.weight-decay=0.1"]), again).tune()


def test_a_file_that_is_no_cell_is_refused(table_file: Any) -> None:
    path = table_file()
    file = path.parent / "results" / "small" / "tune" / "full-lr0.001.json"
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    with pytest.raises(ConfigError, match="no cell of a table"):
        job(path, Fake()).tune()


def test_the_final_runs_take_the_best_rate_and_of_equals_the_smaller(table_file: Any) -> None:
    scores = {"full-lr0.001": 0.7, "full-lr0.01": 0.7, "narrow-lr0.01": 0.6, "narrow-lr0.1": 0.8}
    fake = Fake(lambda cell: scores.get(cell.path.stem, 0.5))
    whole = job(table_file(), fake)
    whole.tune()
    whole.final()
    finals = [cell for cell in fake.cells if cell.name.startswith("final/")]
    assert [cell.name for cell in finals] == [
        "final/full-seed0",
        "final/full-seed1",
        "final/narrow-seed0",
        "final/narrow-seed1",
    ]
    assert {cell.experiment.data.eval_split for cell in finals} == {"test"}
    assert [cell.experiment.run.seed for cell in finals] == [0, 1, 0, 1]
    assert [cell.experiment.training.learning_rate for cell in finals] == [0.001] * 2 + [0.1] * 2
    assert finals[0].experiment.strategy.evaluate_every == 1


def test_a_run_that_learned_nothing_is_kept_but_never_the_best(table_file: Any) -> None:
    fake = Fake(lambda cell: math.nan if cell.rate == Rate(0.01) else 0.1)
    tuned = job(table_file(), fake)
    tuned.tune()
    full, narrow = tuned.methods
    assert tuned.best_rate(full) == Rate(0.001)
    assert tuned.best_rate(narrow) == Rate(0.1)
    assert "nothing learned" in to_text(tuning_table(tuned), 120)


def test_final_runs_before_tuning_are_refused_with_the_cells_that_lack(table_file: Any) -> None:
    with pytest.raises(ConfigError, match=r"tune/full-lr0\.001.*phase 'tune' first"):
        job(table_file(), Fake()).final()


def test_one_method_alone_can_be_run(table_file: Any) -> None:
    fake = Fake()
    job(table_file(), fake, only=("narrow",)).tune()
    assert {cell.method.name for cell in fake.cells} == {"narrow"}
    with pytest.raises(ConfigError, match="full, narrow"):
        job(table_file(), fake, only=("wide",))


def test_compare_reads_the_final_cells_a_row_a_method(table_file: Any) -> None:
    from fedpet.report.compare import compare_table
    from fedpet.report.results import read_results
    from fedpet.report.rows import compare_rows

    whole = job(table_file(), Fake(lambda cell: 0.8 if cell.method.name == "full" else 0.6))
    whole.tune()
    whole.final()
    results = read_results(whole.final_results())
    assert [(row.group.method, row.seeds) for row in compare_rows(results)] == [
        ("full", 2),
        ("narrow", 2),
    ]
    assert "narrow" in to_text(compare_table(results), 120)


def test_where_there_is_one_rate_nothing_is_tuned(table_file: Any) -> None:
    path = table_file(methods={"full": {"learning-rates": [0.01]}})
    fake = Fake()
    running = job(path, fake)
    running.tune()
    assert not fake.ran
    running.final()
    assert fake.ran == ["final/full-seed0", "final/full-seed1"]
    assert {cell.rate for cell in fake.cells} == {Rate(0.01)}


def test_the_tuning_table_says_when_the_best_rate_lies_at_the_edge(table_file: Any) -> None:
    rates = {"full": {"learning-rates": [0.001, 0.01, 0.1]}}
    middle = job(table_file(methods=rates), Fake(lambda c: 0.9 if c.rate == Rate(0.01) else 0.1))
    middle.tune()
    assert "edge" not in to_text(tuning_table(middle), 160)
    shutil.rmtree(middle.table.results)
    edge = job(table_file(methods=rates), Fake(lambda cell: cell.rate.learning_rate))
    edge.tune()
    assert "at the edge of its grid" in to_text(tuning_table(edge), 160)


def test_a_check_runs_finished_cells_again_and_notes_what_came_out(table_file: Any) -> None:
    whole = job(table_file(), Fake())
    with pytest.raises(ConfigError, match="no finished cell"):
        whole.check(2)
    whole.tune()
    whole.final()
    before = {path: path.read_bytes() for path in whole.table.results.rglob("*.json")}
    again = Fake()
    assert job(table_file(), again).check(3)
    assert len(set(again.ran)) == 3
    checks = json.loads((whole.table.results / "checks.json").read_text())
    assert [check["same"] for check in checks] == [True] * 3
    assert {check["cell"] for check in checks} == set(again.ran)
    assert all(path.read_bytes() == content for path, content in before.items())

    assert not job(table_file(), Fake(lambda cell: 0.123)).check(1, ["final"])
    checks = json.loads((whole.table.results / "checks.json").read_text())
    assert [check["same"] for check in checks] == [True] * 3 + [False]
    assert checks[-1]["cell"].startswith("final/")
    assert checks[-1]["before"]["metric"] == 0.5
    assert checks[-1]["after"]["metric"] == 0.123


def test_the_checks_are_no_result_to_compare(table_file: Any) -> None:
    from fedpet.report.results import read_results

    whole = job(table_file(), Fake())
    whole.tune()
    whole.check(1)
    assert len(read_results([whole.table.results])) == 4


def test_a_run_that_leaves_no_result_is_told_with_its_last_lines(
    table_file: Any, tmp_path: Path
) -> None:
    read = TableFile.read(table_file())
    cell = read.tune_cells(read.methods[0])[0]
    broken = replace(cell.experiment, backbone=replace(cell.experiment.backbone, model="/nowhere"))
    with pytest.raises(RunError, match=r"(?s)exit code 2.*no folder '/nowhere'"):
        table.run_in_process(replace(cell, experiment=broken), tmp_path, 100)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["run", "prefix"], "peft-lora"),
        (["run", "full", "absent"], "film-reviews"),
        (["run", "full", "--set", "mask.density=2"], "a fraction of the entries"),
        (["table", "absent.toml"], "no table file"),
        (["table", "absent.toml", "--phase", "last"], "tune, final"),
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


def _command(arguments: list[str], timeout: float = 100) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join((*filter(None, sys.path), str(REPOSITORY)))
    return subprocess.run(
        [sys.executable, "-m", "simulations.benchmarks", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.mark.simulation
@pytest.mark.timeout(320)
def test_a_table_of_one_cell_runs_on_ray_and_is_not_run_again(table_file: Any) -> None:
    path = table_file(
        methods={"head": {"learning-rates": [0.1]}},
        set=["strategy.num-rounds=1"],
        final={"split": "test", "seeds": [0]},
    )
    done = _command(["table", str(path), "--phase", "final"], 300)
    assert done.returncode == 0, done.stderr
    file = path.parent / "results" / "small" / "final" / "head-seed0.json"
    cell = json.loads(file.read_text())
    assert cell["result"]["run"]["status"] == "ok"
    assert cell["result"]["communication"]["messages"] == 8
    assert "head" in done.stdout
    again = _command(["table", str(path), "--phase", "final"])
    assert again.returncode == 0, again.stderr
    assert "1 of 1 cells are there already" in again.stderr

    # The same settings on a grid in this process: the same bytes.
    read = TableFile.read(path)
    settings = read.final_cells(read.methods[0], Rate(0.1))[0].experiment
    settings = replace(settings, run=replace(settings.run, out=str(path.parent / "here")))
    assert run("head", settings)["final_values_sha256"] == cell["result"]["final_values_sha256"]
