"""Tables in the terminal say what the results say."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_runs import FULL, HEAD_VALUES, make_result, to_text

from fedpet.errors import InputError
from fedpet.report.compare import compare_table
from fedpet.report.comparison import compare_rows
from fedpet.report.number_format import show_count, show_percent, show_ratio
from fedpet.report.results import read_results
from fedpet.report.run_table import run_table
from fedpet.utils.formatting import format_bytes


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture
def three_methods(tmp_path: Path) -> Path:
    for seed in range(3):
        make_result(tmp_path / f"fedpet-{seed}", seed=seed, final=0.80 + 0.01 * seed)
        make_result(
            tmp_path / f"full-{seed}",
            method="full",
            seed=seed,
            final=0.82,
            message_bytes=90_000_000,
            values=FULL,
        )
        make_result(
            tmp_path / f"peft-lora-{seed}",
            method="peft-lora",
            seed=seed,
            final=0.79,
            message_bytes=600_000,
            values={"lora": 147_456, "head": HEAD_VALUES},
        )
    return tmp_path


# The end of a run


def test_a_runs_table_holds_the_numbers_of_its_result() -> None:
    result = make_result(final=0.8123)
    text = words(to_text(run_table(result)))
    sent = result["communication"]
    assert "accuracy before 0.5000" in text
    assert "accuracy after 0.8123" in text
    assert "values communicated 63,070" in text
    assert "mask 53,084 structure 9,216 (lnfit 9,216) head 770 not averaged exactly nothing" in text
    assert "up, a client and round 40 kB" in text
    assert "plan, a client, once 600 B" in text
    assert f"sent in total {format_bytes(sent['total_bytes'])}" in text
    assert f"dense FedAvg would send {format_bytes(sent['dense_fedavg_total_bytes'])}" in text
    assert f"1/{sent['dense_fedavg_total_bytes'] / sent['total_bytes']:,.0f} of dense" in text
    assert "time 3 min 12 s (rounds 44 s" in text
    assert "rounds outside training 10.0 %" in text


def test_a_runs_table_names_a_searched_structure_and_what_is_not_averaged_exactly() -> None:
    values = {"mask": 50, "lora-factors": 30, "ln-bias": 20, "head": 6}
    result = make_result(values=values)
    result["model"] |= {"structure_method": "s3pet", "inexact_kinds": ["lora-factors"]}
    text = words(to_text(run_table(result)))
    assert "mask 50 searched structure 50 (lora-factors 30, ln-bias 20) head 6" in text
    assert "not averaged exactly lora-factors: the mean of factors" in text
    del result["model"]["structure_method"]  # as an older fedpet wrote it
    assert "structure 50 (lora-factors 30" in words(to_text(run_table(result)))


def test_a_baselines_table_names_its_values_by_kind() -> None:
    result = make_result(method="full", values={"backbone": 50, "head": 6})
    assert "by kind backbone 50, head 6" in words(to_text(run_table(result)))


def test_a_runs_table_names_the_refused_and_their_reason() -> None:
    text = words(to_text(run_table(make_result(refused=4))))
    assert "client film-0: its training gave NaN" in text
    assert "and 1 more in result.json" in text


def test_a_runs_table_shows_what_stands_in_brackets_as_it_is() -> None:
    assert "[bold]mine" in to_text(run_table(make_result(experiment="[bold]mine")))


def test_a_run_without_a_measure_before_training_still_has_a_table() -> None:
    result = make_result()
    result["quality"]["before"] = None
    result["time"]["outside_training_fraction"] = None
    text = to_text(run_table(result))
    assert "before" not in text
    assert "accuracy after" in text


# Comparison


def test_a_row_is_the_mean_over_the_seeds_of_a_method(three_methods: Path) -> None:
    rows = {row.group.method: row for row in compare_rows(read_results([three_methods]))}
    assert list(rows) == ["full", "peft-lora", "fedpet"]
    fedpet, full = rows["fedpet"], rows["full"]
    assert (fedpet.seeds, fedpet.runs) == (3, 3)
    assert fedpet.mean == pytest.approx(0.81)
    assert fedpet.deviation == pytest.approx(0.01)  # of a sample: n - 1
    assert fedpet.fraction_of_full == pytest.approx(0.81 / 0.82)
    assert fedpet.ratio_to_full == pytest.approx(fedpet.total_bytes / full.total_bytes)
    result = read_results([three_methods / "fedpet-1"])[0]
    assert fedpet.total_bytes == result["communication"]["total_bytes"]
    assert fedpet.ratio_to_dense == pytest.approx(result["communication"]["ratio_to_dense"])


@pytest.mark.parametrize("width", [80, 120])
def test_no_number_of_a_comparison_is_cut_off(three_methods: Path, width: int) -> None:
    text = to_text(compare_table(read_results([three_methods])), width)
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= width
    for number in ("0.8100", "± 0.0100", "98.8 %", "100.0 %", "63,070", "22.7 M", "40 kB"):
        assert number in text


def test_without_full_fine_tuning_nothing_is_measured_against_it(tmp_path: Path) -> None:
    make_result(tmp_path / "a")
    text = to_text(compare_table(read_results([tmp_path / "a"])), 120)
    assert "full" not in text
    assert "±" not in text  # one run has no deviation


def test_runs_of_one_method_that_differ_in_a_setting_are_rows_of_their_own(tmp_path: Path) -> None:
    make_result(tmp_path / "a", seed=0)
    make_result(tmp_path / "b", seed=1)
    make_result(tmp_path / "c", seed=0, settings=["mask.density=0.01"], message_bytes=80_000)
    rows = compare_rows(read_results([tmp_path]))
    assert [(row.group.settings, row.seeds) for row in rows] == [
        ((("mask.density", "0.01"),), 1),
        ((("mask.density", "0.005"),), 2),
    ]
    text = to_text(compare_table(read_results([tmp_path])))
    assert "fedpet b: mask.density = 0.005" in text


def test_experiments_are_never_averaged_together(tmp_path: Path) -> None:
    make_result(tmp_path / "a", experiment="cola")
    make_result(tmp_path / "b", experiment="mrpc")
    assert [row.group.experiment for row in compare_rows(read_results([tmp_path]))] == [
        "cola",
        "mrpc",
    ]


def test_runs_on_other_rows_or_other_clients_are_tables_of_their_own(tmp_path: Path) -> None:
    for split in ("test", "validation"):
        for method in ("full", "fedpet"):
            settings = [f"data.eval-split={split}"]
            make_result(tmp_path / f"{split}-{method}", method=method, settings=settings)
    rows = compare_rows(read_results([tmp_path]))
    assert [(row.group.title, row.group.name) for row in rows] == [
        ("film-reviews, data.eval-split = test", "full"),
        ("film-reviews, data.eval-split = test", "fedpet"),
        ("film-reviews, data.eval-split = validation", "full"),
        ("film-reviews, data.eval-split = validation", "fedpet"),
    ]


def test_the_best_of_several_rates_of_full_fine_tuning_is_the_measure(tmp_path: Path) -> None:
    for rate, final in (("0.001", 0.6), ("0.0001", 0.8)):
        settings = [f"training.learning-rate={rate}"]
        make_result(tmp_path / rate, method="full", final=final, settings=settings)
    make_result(tmp_path / "fedpet", final=0.4)
    results = read_results([tmp_path])
    rows = {row.group.name: row.fraction_of_full for row in compare_rows(results)}
    assert rows == pytest.approx({"full a": 1.0, "full b": 0.75, "fedpet": 0.5})
    assert '"of full" is of full a, the best of 2.' in to_text(compare_table(results))


def test_a_run_reached_on_two_ways_counts_once(tmp_path: Path) -> None:
    make_result(tmp_path / "a")
    results = read_results([tmp_path, tmp_path / "a", tmp_path / "a" / "result.json"])
    assert len(results) == 1


def test_one_seed_with_two_outcomes_is_told(tmp_path: Path) -> None:
    for name, final in (("x", 0.8), ("y", 0.7)):
        cell = {"result": make_result(final=final), "commit": name}
        (tmp_path / f"{name}.json").write_text(json.dumps(cell), encoding="utf-8")
    assert "2 runs over 1 seeds" in words(to_text(compare_table(read_results([tmp_path]))))


def test_a_cell_file_holds_its_result_beside_its_settings(tmp_path: Path) -> None:
    folder = tmp_path / "results" / "codecs"
    folder.mkdir(parents=True)
    for codec in ("float32", "eden-4"):
        cell = {
            "settings": {"overrides": [f"codec.uplink={codec}", "run.seed=0"], "method": "fedpet"},
            "commit": codec,
            "result": make_result(message_bytes=len(codec) * 1000),
        }
        (folder / f"{codec}.json").write_text(json.dumps(cell), encoding="utf-8")
    (folder / "notes.json").write_text('{"machine": "two cores"}', encoding="utf-8")
    rows = compare_rows(read_results([tmp_path / "results"]))
    assert {row.group.settings for row in rows} == {
        (("codec.uplink", "float32"),),
        (("codec.uplink", "eden-4"),),
    }


@settings(max_examples=30)
@given(st.permutations(range(6)), st.lists(st.floats(0.1, 1), min_size=6, max_size=6))
def test_rows_do_not_depend_on_the_order_of_the_results(
    order: list[int], finals: list[float]
) -> None:
    results = [
        make_result(
            method="full" if index % 2 else "fedpet",
            seed=index // 2,
            final=final,
            message_bytes=9_000_000 if index % 2 else 40_000,
            rounds=1,
        )
        for index, final in enumerate(finals)
    ]
    rows = compare_rows(results)
    for row, other in zip(rows, compare_rows([results[i] for i in order]), strict=True):
        assert row.group.name == other.group.name
        assert row.mean == pytest.approx(other.mean)
        assert row.deviation == pytest.approx(other.deviation)
        assert row.fraction_of_full == pytest.approx(other.fraction_of_full)


# Bad input


def test_an_absent_path_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="there is no run folder or result file 'runs/none'"):
        read_results([Path("runs/none")])


def test_a_folder_without_a_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no finished run"):
        read_results([tmp_path])


def test_an_unfinished_run_is_refused_alone_and_left_out_aloud_among_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_result(tmp_path / "done")
    make_result(tmp_path / "broken")
    (tmp_path / "broken" / "result.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert len(read_results([tmp_path])) == 1
    assert "has not finished" in caplog.text
    with pytest.raises(InputError, match="holds no finished run"):
        read_results([tmp_path / "broken"])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not a readable JSON file"),
        ("[1]", "is no result: it needs the keys run, model, quality, communication"),
        ('{"result": null}', "is no result"),
    ],
)
def test_a_file_that_is_no_result_is_refused(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=sentence) as refusal:
        read_results([path])
    assert "other.json" in str(refusal.value)


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(make_result() | {"schema": 2}), encoding="utf-8")
    with pytest.raises(InputError, match=r"reads results of schema 1, .* has schema 2"):
        read_results([path])


def test_a_result_with_a_hole_is_refused_with_the_holes_name(tmp_path: Path) -> None:
    result = make_result()
    del result["communication"]["total_bytes"]
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result), encoding="utf-8")
    with pytest.raises(InputError, match=r"lacks communication\.total_bytes"):
        read_results([path])


# Numbers


def test_numbers_read_as_people_write_them() -> None:
    assert [show_count(n) for n in (0, 9986, 999_949, 999_950, 22_713_216, 10**10)] == [
        "0",
        "9,986",
        "999,949",
        "1 M",
        "22.7 M",
        "10 G",
    ]
    assert [show_ratio(r) for r in (0, 1 / 2266, 1 / 1.25, 1, 3.5)] == [
        "0",
        "1/2,266",
        "1/1.25",
        "1",
        "3.5 x",
    ]
    assert [show_percent(f) for f in (0, 0.0048, 0.09996, 0.5, 1)] == [
        "0 %",
        "0.480 %",
        "10.0 %",
        "50.0 %",
        "100.0 %",
    ]
