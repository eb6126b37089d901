"""The majority baseline and a run's warnings are shown wherever its metric is."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
from html_reader import Reader
from report_runs import make_result, to_text

from fedpet.report.compare import compare_table
from fedpet.report.comparison import compare_rows
from fedpet.report.loading import read_report
from fedpet.report.number_format import show_predicted
from fedpet.report.page import page, write_png
from fedpet.report.page_parts import page_parts
from fedpet.report.results import read_results
from fedpet.report.run_table import run_table
from fedpet.run.run_folder import RunFolder

NEW = ("majority_baseline", "majority_class", "predicted", "loss_by_round", "warnings")


def words(text: str) -> str:
    return " ".join(text.split())


def collapsed(path: Path | None = None, **changes: Any) -> dict[str, Any]:
    """A run that answers "good" for every row."""
    return make_result(
        path, final=0.4, majority=0.52, predicted={"bad": 0.0, "good": 1.0}, **changes
    )


def diverged(path: Path) -> None:
    """A run whose last metric was NaN, as its folder holds it."""
    result = make_result(path, final=math.nan)
    (path / "result.json").unlink()
    RunFolder(path).write_result(result)


def test_the_terminal_table_shows_the_baseline_and_what_is_predicted() -> None:
    text = words(to_text(run_table(make_result(majority=0.53))))
    assert "accuracy after 0.8000" in text
    assert "majority baseline 0.5300 (always 'good')" in text
    assert "predicted bad 45.0 %, good 55.0 %" in text
    assert "warning" not in text


def test_the_terminal_table_shows_every_warning_in_full() -> None:
    result = collapsed()
    text = words(to_text(run_table(result)))
    assert len(result["quality"]["warnings"]) == 3  # one class, fell, not above the baseline
    for warning in result["quality"]["warnings"]:
        assert words(f"warning {warning}") in text
    assert "try lower rates" in text


def test_the_page_shows_the_baseline_what_is_predicted_and_every_warning(tmp_path: Path) -> None:
    result = collapsed(tmp_path / "run")
    text = Reader(page(read_report(tmp_path / "run"))).text
    assert "majority baseline 0.5200 (always 'good')" in text
    assert "class predicted bad 0 % good (majority) 100.0 %" in text
    for warning in result["quality"]["warnings"]:
        assert words(warning) in words(text)
    at_the_top = page_parts(read_report(tmp_path / "run"))["troubles"]
    assert at_the_top == result["quality"]["warnings"]


def test_a_comparison_shows_the_baseline_once_and_each_run_s_warnings(tmp_path: Path) -> None:
    make_result(tmp_path / "full", method="full", majority=0.52)
    result = collapsed(tmp_path / "fedpet", seed=3)
    text = words(to_text(compare_table(read_results([tmp_path])), 120))
    assert text.count("Majority baseline of accuracy: 0.5200 (always 'good').") == 1
    for warning in result["quality"]["warnings"]:
        assert words(f"fedpet, seed 3: {warning}") in text
    assert "full, seed" not in text


def test_of_many_warnings_a_comparison_shows_three_and_counts_the_others(tmp_path: Path) -> None:
    for seed in range(2):
        collapsed(tmp_path / f"fedpet-{seed}", seed=seed)
    text = words(to_text(compare_table(read_results([tmp_path])), 120))
    assert text.count("fedpet, seed") == 3
    assert "fedpet: 3 more warnings in the runs' result.json." in text


def test_baselines_that_differ_are_all_named(tmp_path: Path) -> None:
    make_result(tmp_path / "a", majority=0.5)
    make_result(tmp_path / "b", seed=1, majority=0.6)
    text = words(to_text(compare_table(read_results([tmp_path])), 120))
    assert "accuracy: 0.5000 (always 'good'); 0.6000 (always 'good')." in text


def test_a_result_of_an_older_fedpet_is_shown_as_before(tmp_path: Path) -> None:
    result = make_result(tmp_path / "run")
    for name in NEW:
        del result["quality"][name]
    (tmp_path / "run" / "result.json").write_text(json.dumps(result), encoding="utf-8")
    shown = [
        to_text(run_table(result)),
        to_text(compare_table(read_results([tmp_path / "run"]))),
        Reader(page(read_report(tmp_path / "run"))).text,
    ]
    for text in shown:
        assert "0.8000" in text
        assert "baseline" not in text


def test_every_committed_result_of_the_benchmarks_is_read(
    repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        results = read_results([repository / "benchmarks" / "results" / "default"])
    assert results
    assert "accuracy" in to_text(compare_table(results), 120)


def test_a_run_that_diverged_is_read_and_shown_with_its_status(tmp_path: Path) -> None:
    diverged(tmp_path / "fedpet")
    make_result(tmp_path / "full", method="full")
    results = read_results([tmp_path])
    text = words(to_text(compare_table(results), 120))
    assert "fedpet, seed 0: diverged" in text
    assert "the final accuracy is NaN" in text
    found = Reader(page(read_report(tmp_path / "fedpet", [tmp_path / "full"]))).text
    assert "diverged" in found
    assert "nan" in found
    write_png(read_report(tmp_path / "fedpet"), tmp_path / "plot.png")
    assert words(to_text(run_table(read_results([tmp_path / "fedpet"])[0]))).count("diverged") == 1


def test_a_full_fine_tuning_that_diverged_is_no_measure_where_another_did_not(
    tmp_path: Path,
) -> None:
    diverged(tmp_path / "a")
    for name, method, final in (("b", "full", 0.8), ("c", "fedpet", 0.4)):
        make_result(tmp_path / name, method=method, final=final)
    results = read_results([tmp_path])
    results[0]["run"]["method"] = "full"
    results[0]["settings"]["training.learning-rate"] = "9.0"
    for order in (results, results[::-1]):
        rows = {row.group.method: row for row in compare_rows(order) if row.mean < 0.5}
        assert rows["fedpet"].fraction_of_full == pytest.approx(0.5)


def test_of_many_classes_the_number_that_is_predicted_is_shown() -> None:
    shares = {f"class {number}": 0.0 for number in range(77)} | {"class 3": 0.9, "class 5": 0.1}
    assert show_predicted(shares) == "2 of 77 classes, class 3 90.0 % at most"
