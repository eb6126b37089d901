"""The suite tunes on rows of its own, runs what is missing once, and shows what came out."""

from __future__ import annotations

import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from suite_jobs import Pretend, letters, suite_of, tables

from benchmarks import __main__ as command
from benchmarks.cell import Cell
from benchmarks.suite_cell import FAILED, SuiteCell
from benchmarks.suite_file import read_suite
from benchmarks.suite_tables import (
    costs_table,
    difficulty,
    methods_of,
    paired,
    question,
    suite_table,
    summarise_row,
    until,
)
from fedpet.errors import ConfigError, RunError


def quiet(line: str) -> None:
    """Say nothing."""


def rising(cell: SuiteCell) -> float | None:
    """0.3 is the best rate, 1 learns nothing; a seed is worth a point."""
    rate = 0.1 if cell.rate is None else cell.rate.learning_rate
    return None if rate >= 1 else 0.6 + 0.1 * min(rate, 0.3) + 0.01 * cell.seed


# -- the work


def test_an_interrupted_suite_goes_on_and_no_cell_is_run_twice(tmp_path: Path) -> None:
    class Interrupted(Pretend):
        def __call__(self, cell):  # type: ignore[no-untyped-def]
            if len(self.ran) == 4:
                raise KeyboardInterrupt
            return super().__call__(cell)

    first, second, third = Interrupted(), Pretend(), Pretend()
    with pytest.raises(KeyboardInterrupt):
        suite_of(tmp_path, first).complete(quiet)
    assert len(first.ran) == 4
    assert suite_of(tmp_path, second).complete(quiet)
    assert len({*first.ran, *second.ran}) == len(first.ran) + len(second.ran)
    assert suite_of(tmp_path, third).complete(quiet)
    assert third.ran == []


def test_cells_come_in_the_order_of_the_work_and_reported_ones_after_their_rates(
    tmp_path: Path,
) -> None:
    run = Pretend(lambda cell: 0.9 if cell.rate and cell.rate.learning_rate == 0.1 else 0.5)
    suite_of(tmp_path, run).complete(quiet)
    assert run.ran[:7] == [
        "films/final/probe-seed0",
        *(f"films/tune/mask-lr{rate}" for rate in ("0.03", "0.1", "0.3")),
        *(f"films/final/mask-seed{seed}" for seed in (0, 1, 2)),
    ]
    assert run.ran[-1] == "letters/final/mask-seed2"
    tuned_alike = [name for name in run.ran if "mask-lossless" in name]
    assert tuned_alike == [f"films/final/mask-lossless-seed{seed}" for seed in (0, 1, 2)]


def test_a_method_with_seeds_of_its_own_is_reported_on_those_alone(tmp_path: Path) -> None:
    content = tables()
    content["methods"]["full"]["seeds"] = [0, 4]
    run = Pretend()
    suite = suite_of(tmp_path, run, content=content)
    assert [left for _, name, left, _ in suite.costs() if name == "full"] == [3 + 2]
    assert suite.complete(quiet)
    reported = [name for name in run.ran if "final/full" in name]
    assert reported == ["films/final/full-seed0", "films/final/full-seed4"]
    assert "films/final/mask-seed1" in run.ran  # the others have the suite's
    content["methods"]["full"]["seeds"] = [0, content["tune-seed"]]
    with pytest.raises(ConfigError, match="tune-seed must be none of seeds"):
        suite_of(tmp_path, content=content)


def test_no_cell_begins_when_the_minutes_are_over(tmp_path: Path) -> None:
    run = Pretend()
    assert not suite_of(tmp_path, run).complete(quiet, minutes=0)
    assert len(run.ran) <= 1


def test_cells_side_by_side_are_those_of_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # threads in the place of processes: what is tested is which cell begins when
    monkeypatch.setattr("benchmarks.suite._processes", ThreadPoolExecutor)
    one, two = Pretend(rising), Pretend(rising)
    for folder, run, jobs in (("one", one, 1), ("two", two, 2)):
        (tmp_path / folder).mkdir()
        suite = suite_of(tmp_path / folder, run)
        assert suite.complete(quiet, jobs=jobs)
        assert suite.runnable() == []
    assert sorted(one.ran) == sorted(two.ran)
    late = suite_of(tmp_path, Pretend(rising))
    assert not late.complete(quiet, minutes=0, jobs=2)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_cell_that_fails_is_told_and_keeps_no_other_from_its_run(
    tmp_path: Path, jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(Pretend):
        def __call__(self, cell: Cell) -> dict[str, Any]:
            if cell.path.stem == "full-lr0.001":
                raise RunError("the disk is full.")
            return super().__call__(cell)

    monkeypatch.setattr("benchmarks.suite._processes", ThreadPoolExecutor)
    lines: list[str] = []
    run = Failing()
    suite = suite_of(tmp_path, run)
    assert not suite.complete(lines.append, jobs=jobs)
    assert [line for line in lines if "failed" in line] == [
        "films/tune/full-lr0.001 failed: the disk is full."
    ]
    assert "letters/final/mask-seed2" in run.ran
    assert [cell.path.stem for cell in suite.runnable()] == ["full-lr0.001"]


def test_a_best_at_the_edge_moves_the_grid_and_one_that_stays_there_is_flagged(
    tmp_path: Path,
) -> None:
    suite = suite_of(tmp_path, Pretend(rising), only=["films/mask"])
    suite.complete(quiet)
    choice = suite.choice(suite.datasets["films"], suite.methods["mask"])
    assert (choice.best, choice.at_edge) == (0.3, False)
    assert choice.tried == (0.03, 0.1, 0.3, 1.0)
    ever = Pretend(lambda cell: cell.rate.learning_rate if cell.rate else 0.0)
    (tmp_path / "edge").mkdir()
    suite = suite_of(tmp_path / "edge", ever, only=["letters"])
    suite.complete(quiet)
    choice = suite.choice(suite.datasets["letters"], suite.methods["mask"])
    assert (choice.best, choice.at_edge, len(choice.tried)) == (3.0, True, 5)
    assert "3 (edge)" in methods_of(suite, "letters")


def test_tuning_reads_other_rows_and_another_seed_than_what_is_reported(tmp_path: Path) -> None:
    suite = suite_of(tmp_path)
    films, mask = suite.datasets["films"], suite.methods["mask"]
    tune = suite.tune_cell(films, mask, 0.1).experiment
    final = [cell.experiment for cell in suite.final_cells(films, mask, 0.1)]
    assert tune.data.eval_split == "validation"
    assert {one.data.eval_split for one in final} == {"test"}
    assert tune.run.seed not in {one.run.seed for one in final}
    assert final[0].training.rate_of("mask") == 0.1
    assert final[0].training.rate_of("head") == 0.03


def test_rows_with_the_rates_of_another_take_all_of_them(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, Pretend())
    suite.complete(quiet)
    cells = suite.final_cells(suite.datasets["films"], suite.methods["mask-lossless"], 0.03)
    assert {cell.experiment.training.rate_of("head") for cell in cells} == {0.03}
    assert {cell.experiment.codec.uplink for cell in cells} == {"float32"}


def test_a_cell_of_other_settings_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    suite_of(tmp_path, Pretend(), only=["films/full"]).complete(quiet)
    content = tables(base={"strategy": {"num-rounds": 3}, "mask": {"enabled": False}})
    with pytest.raises(ConfigError, match=r"strategy.num-rounds was 2, is 3"):
        suite_of(tmp_path, Pretend(), only=["films/full"], content=content).complete(quiet)


def test_the_codec_of_a_baseline_decides_its_cell_and_the_data_folder_does_not(
    tmp_path: Path,
) -> None:
    suite_of(tmp_path, Pretend(), only=["films/full"]).complete(quiet)
    again = Pretend()
    suite_of(tmp_path, again, only=["films/full"], folder=tmp_path).complete(quiet)
    assert again.ran == []
    content = tables()
    content["methods"]["full"]["set"] = ["codec.uplink=float32"]
    with pytest.raises(ConfigError, match=r"codec.uplink was 'dither-3', is 'float32'"):
        suite_of(tmp_path, Pretend(), only=["films/full"], content=content).complete(quiet)


def test_the_rounds_of_training_are_no_setting_of_the_probe_and_its_rows_are(
    tmp_path: Path,
) -> None:
    suite_of(tmp_path, Pretend(), only=["films/probe"]).complete(quiet)
    longer = tables(base={"strategy": {"num-rounds": 9}, "mask": {"enabled": True}})
    assert suite_of(tmp_path, Pretend(), only=["films/probe"], content=longer).runnable() == []
    fewer = tables(base={"data": {"max-train-rows": 9}})
    with pytest.raises(ConfigError, match=r"data.max-train-rows was 0, is 9"):
        suite_of(tmp_path, Pretend(), only=["films/probe"], content=fewer).runnable()


def test_finished_cells_are_run_again_and_a_difference_is_told(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, Pretend(), only=["films/mask"])
    suite.complete(quiet)
    assert suite.check(3, quiet)
    other = suite_of(tmp_path, Pretend(lambda cell: 0.7), only=["films/mask"])
    assert not other.check(1, quiet)
    notes = json.loads((suite.results / "checks.json").read_text())
    assert [note["same"] for note in notes] == [True, True, True, False]


# -- real runs of a small model


def test_a_small_suite_runs_for_real_probe_and_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = tables(
        base=letters(tmp_path),
        work=[{"datasets": ["letters"], "methods": ["probe", "mask"]}],
        seeds=[0],
        **{"most-rates": 3},
    )
    suite_of(tmp_path, content=content)
    arguments = ["suite", str(tmp_path / "small.toml"), "--data", str(tmp_path / "sets")]
    monkeypatch.setattr("sys.argv", ["benchmarks", *arguments])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 0
    assert "mask" in capsys.readouterr().out
    suite = read_suite(tmp_path / "small.toml", folder=tmp_path / "sets")
    assert suite.runnable() == []
    assert suite.check(1, quiet)
    assert difficulty(suite).count("letters") == 1
    with pytest.raises(ConfigError, match="name the folder that holds it with --data"):
        read_suite(tmp_path / "small.toml").finished()[0].run()


def test_rates_at_which_no_round_averages_are_a_result_that_is_not_chosen(
    tmp_path: Path,
) -> None:
    run = Pretend(lambda cell: None if cell.rate and cell.rate.learning_rate > 0.05 else 0.6)
    suite = suite_of(tmp_path, run, only=["films/mask"])
    suite.complete(quiet)
    choice = suite.choice(suite.datasets["films"], suite.methods["mask"])
    assert choice.best == 0.003
    failed = suite.tune_cell(suite.datasets["films"], suite.methods["mask"], 0.1)
    result = failed.read()
    assert result is not None
    assert failed.fingerprint(result) == {"status": FAILED}


# -- what is shown


def test_differences_are_paired_by_seed_and_targets_are_read_off_the_curves(
    tmp_path: Path,
) -> None:
    better = {"mask": 0.02, "full": 0.0}
    run = Pretend(lambda cell: 0.6 + 0.1 * cell.seed + better.get(cell.method, 0.0))
    suite = suite_of(tmp_path, run)
    suite.complete(quiet)
    films = suite.datasets["films"]
    mask, full = (summarise_row(suite, films, suite.methods[name]) for name in ("mask", "full"))
    assert mask is not None
    assert full is not None
    mean, error, seeds = paired(mask, full)
    assert (round(mean, 6), round(error, 6), seeds) == (2.0, 0.0, 3)
    assert until(full, full, 0.95) == (1, 2000)
    assert until(full, full, 0.99) == (2, 4000)
    assert until(mask, full, 1.5) is None
    shown = methods_of(suite, "films")
    assert "+2.0 ± 0.0" in shown
    assert "1/2,500" in shown
    assert "+2.0 ± 0.0, 1 x bytes" in question(suite, "full", ["mask", "probe"], ["films"])
    console = Console(file=io.StringIO(), width=200)
    console.print(suite_table(suite))
    assert "letters" in console.file.getvalue()  # type: ignore[attr-defined]


def test_costs_are_what_cells_took_and_for_others_a_guess_from_their_like(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, Pretend())
    places, rows = suite.datasets, suite.methods
    assert suite.seconds(places["letters"], rows["mask"]) == 30
    probe, tuned_thrice, with_the_rates_of_another = 1, 3 * (3 + 3), 3
    left = sum(cells for _, _, cells, _ in suite.costs())
    assert left == probe + tuned_thrice + with_the_rates_of_another
    suite.complete(quiet)
    assert suite.costs() == []
    assert suite.seconds(places["films"], rows["full"]) == 40
    console = Console(file=io.StringIO(), width=120)
    console.print(costs_table(suite))
    assert "0.00" in console.file.getvalue()  # type: ignore[attr-defined]


# -- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tune-seed": 1}, "tune-seed must be none of seeds"),
        ({"most-rates": 2}, "most-rates at least 3"),
        ({"colour": 1}, "unknown key 'colour'"),
        ({"work": [{"datasets": ["tunes"], "methods": []}]}, "names the data set 'tunes'"),
        ({"work": [{"datasets": [], "methods": ["magic"]}]}, "names the method 'magic'"),
        ({"methods": {"mask": {"runs": "fedpet"}}, "work": []}, "must have a rate, or rates-of"),
        ({"methods": {"prefix": {"rate": 0.1}}, "work": []}, "runs 'prefix'. Known are: fedpet"),
        (
            {"methods": {"a": {"runs": "fedpet", "rates-of": "b"}}, "work": []},
            "takes the rates of 'b', which has none",
        ),
        (
            {"datasets": {"films": {"tune": [], "final": []}}, "methods": {"probe": {}},
             "work": [{"datasets": ["films"], "methods": ["probe"]}]},
            "choose rates on rows that no result is reported on",
        ),
    ],
)  # fmt: skip
def test_a_suite_that_would_mislead_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        suite_of(tmp_path, content=tables(**changes))


def test_only_names_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'lora' is neither a data set nor a method"):
        suite_of(tmp_path, only=["lora"])
    assert {m.name for _, m in suite_of(tmp_path, only=["letters"]).work} == {"mask"}


def test_the_shipped_suite_reads_and_names_its_rows_once(repository: Path) -> None:
    suite = read_suite(repository / "benchmarks" / "suite.toml")
    assert len(suite.datasets) >= 6
    assert len(suite.work) == len({(place.name, row.name) for place, row in suite.work})
    natural = {"films", "airline", "cola", "enron", "domains"}
    assert natural <= set(suite.datasets)
    codecs = {
        suite.experiment(place, row).codec.uplink.removeprefix("topk-0.25+")
        for place, row in suite.work
        if not row.name.endswith("-lossless")
    }
    assert codecs == {"dither-3"}
