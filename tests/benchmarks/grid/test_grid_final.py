"""Final runs at the tuned rates, what a table shows of them, and checks of what is there."""

from __future__ import annotations

import json
import math
import shutil
from typing import Any

import pytest
from grid_jobs import Fake, job
from report_runs import to_text

from benchmarks.rate import Rate
from benchmarks.tables import final_table, tuning_table
from fedpet.errors import ConfigError


def test_the_final_runs_take_the_best_rate_and_of_equals_the_smaller(table_file: Any) -> None:
    scores = {"full-lr0.001": 0.7, "full-lr0.01": 0.7, "narrow-lr0.01": 0.6, "narrow-lr0.1": 0.8}
    fake = Fake(lambda cell: scores.get(cell.path.stem, 0.5))
    whole = job(table_file(), fake)
    whole.complete(["tune"])
    whole.complete(["final"])
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
    tuned.complete(["tune"])
    full, narrow = tuned.methods
    assert tuned.settled(full) == ("full", Rate(0.001))
    assert tuned.settled(narrow) == ("narrow", Rate(0.1))
    assert "nothing learned" in to_text(tuning_table(tuned), 120)


def test_final_runs_before_tuning_are_refused_with_the_cells_that_lack(table_file: Any) -> None:
    with pytest.raises(ConfigError, match=r"tune/full-lr0\.001.*phase 'tune' first"):
        job(table_file(), Fake()).complete(["final"])


def test_one_method_alone_can_be_run(table_file: Any) -> None:
    fake = Fake()
    job(table_file(), fake, only=("narrow",)).complete(["tune"])
    assert {cell.method for cell in fake.cells} == {"narrow"}
    with pytest.raises(ConfigError, match="full, narrow"):
        job(table_file(), fake, only=("wide",))


def test_compare_reads_the_final_cells_a_row_a_method(table_file: Any) -> None:
    from fedpet.report.comparison import compare_rows
    from fedpet.report.results import read_results

    whole = job(table_file(), Fake(lambda cell: 0.8 if cell.method == "full" else 0.6))
    whole.complete(["tune"])
    whole.complete(["final"])
    results = read_results([cell.path for cell in whole.known_cells("final")])
    assert [(row.group.method, row.seeds) for row in compare_rows(results)] == [
        ("full", 2),
        ("narrow", 2),
    ]
    assert "narrow" in to_text(final_table(whole), 120)


def test_where_there_is_one_rate_nothing_is_tuned(table_file: Any) -> None:
    path = table_file(methods={"full": {"learning-rates": [0.01]}})
    fake = Fake()
    running = job(path, fake)
    running.complete(["tune"])
    assert not fake.ran
    running.complete(["final"])
    assert fake.ran == ["final/full-seed0", "final/full-seed1"]
    assert {cell.rate for cell in fake.cells} == {Rate(0.01)}


def test_the_tuning_table_says_when_the_best_rate_lies_at_the_edge(table_file: Any) -> None:
    rates = {"full": {"learning-rates": [0.001, 0.01, 0.1]}}
    middle = job(table_file(methods=rates), Fake(lambda c: 0.9 if c.rate == Rate(0.01) else 0.1))
    middle.complete(["tune"])
    assert "edge" not in to_text(tuning_table(middle), 160)
    shutil.rmtree(middle.results)
    edge = job(table_file(methods=rates), Fake(lambda cell: cell.experiment.training.learning_rate))
    edge.complete(["tune"])
    assert "at the edge of its grid" in to_text(tuning_table(edge), 160)


def test_a_check_runs_finished_cells_again_and_notes_what_came_out(table_file: Any) -> None:
    whole = job(table_file(), Fake())
    with pytest.raises(ConfigError, match="no finished cell"):
        whole.check(2)
    whole.complete(["tune"])
    whole.complete(["final"])
    before = {path: path.read_bytes() for path in whole.results.rglob("*.json")}
    again = Fake()
    assert job(table_file(), again).check(3)
    assert len(set(again.ran)) == 3
    checks = json.loads((whole.results / "checks.json").read_text())
    assert [check["same"] for check in checks] == [True] * 3
    assert {check["cell"] for check in checks} == set(again.ran)
    assert all(path.read_bytes() == content for path, content in before.items())

    assert not job(table_file(), Fake(lambda cell: 0.123)).check(1, ["final"])
    checks = json.loads((whole.results / "checks.json").read_text())
    assert [check["same"] for check in checks] == [True] * 3 + [False]
    assert checks[-1]["cell"].startswith("final/")
    assert checks[-1]["before"]["metric"] == 0.5
    assert checks[-1]["after"]["metric"] == 0.123


def test_the_checks_are_no_result_to_compare(table_file: Any) -> None:
    from fedpet.report.results import read_results

    whole = job(table_file(), Fake())
    whole.complete(["tune"])
    whole.check(1)
    assert len(read_results([whole.results])) == 4
