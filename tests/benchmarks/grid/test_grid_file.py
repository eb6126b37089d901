"""Test what a table file may say, and what is refused: like is compared with like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.experiment_grid import ExperimentCell
from benchmarks.tables import read_grid
from fedpet.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[3]


def test_the_shipped_table_compares_the_three_baselines_and_fedpet_over_equal_grids() -> None:
    shipped = read_grid(REPOSITORY / "benchmarks" / "default.toml")
    assert {method.runs for method in shipped.methods} == {"full", "peft-lora", "head", "fedpet"}
    assert len({len(method.rates) for method in shipped.methods}) == 1
    assert shipped.seeds == (0, 1, 2)
    assert shipped.tune_seed not in shipped.seeds
    for method in shipped.methods:
        for cell in shipped.tune_cells(method):
            assert cell.settings()["data"]["eval-split"] == "validation"
        for cell in shipped.seed_cells(None, method, "", method.rates[0], 0):
            assert cell.settings()["data"]["eval-split"] == "test"


def test_grids_of_different_sizes_are_refused_with_the_sizes(table_file: Any) -> None:
    methods = {"full": {"learning-rates": [0.1, 0.2]}, "head": {"learning-rates": [0.1]}}
    with pytest.raises(ConfigError, match=r"grids of the same size.*'full': 2, 'head': 1"):
        read_grid(table_file(methods=methods))


def test_tuning_on_the_rows_that_are_reported_is_refused(table_file: Any) -> None:
    with pytest.raises(ConfigError, match="no result is reported on"):
        read_grid(table_file(tune={"split": "test", "seed": 3}))


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
        ({"methods": {"full": {"rates": [0.1]}}}, "unknown key 'rates'"),
        ({"methods": {"full": {}}}, "lacks the key 'learning-rates'"),
        ({"methods": {"full": {"rates-of": "head"}}}, "'head', which has no rates of its own"),
        (
            {"methods": {"full": {"learning-rates": [1], "rates-of": "head"}}},
            "learning-rates or rates-of",
        ),
        ({"methods": {"full": {"learning-rates": [1], "structure": "found"}}}, "'drawn'"),
        ({"tune": {"split": "validation", "seed": 1}}, "tune.seed 1 is one of final.seeds"),
        ({"final": {"split": "test", "seeds": ["a"]}}, "whole numbers"),
        ({"experiment": "absent"}, "film-reviews"),
    ],
)
def test_a_wrong_table_file_is_refused_in_one_sentence(
    table_file: Any, changes: dict[str, Any], word: str
) -> None:
    with pytest.raises(ConfigError, match=word):
        read_grid(table_file(**changes))


def test_a_rate_may_name_kinds_of_module(table_file: Any) -> None:
    methods = {"full": {"learning-rates": ["0.001 head=0.1", 0.01]}}
    read = read_grid(table_file(methods=methods))
    first, second = read.tune_cells(read.methods[0])
    assert isinstance(first, ExperimentCell)
    assert isinstance(second, ExperimentCell)
    assert first.experiment.training.rate_of("head") == 0.1
    assert isinstance(first, ExperimentCell)
    assert isinstance(second, ExperimentCell)
    assert first.experiment.training.rate_of("full") == 0.001
    assert second.experiment.training.rate_of("head") == 0.01
    assert first.name == "tune/full-lr0.001-head0.1"
