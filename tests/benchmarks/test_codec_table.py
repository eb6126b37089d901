"""The recommended codec follows from the tables' cells, and `make run` sends by it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.codec_table import (
    DEFAULT,
    MOST_LOST,
    TABLES,
    CodecRow,
    as_text,
    codec_rows,
    default_stands,
    recommended,
)
from benchmarks.tables import read_grid
from fedpet.config import Experiment

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SAFE = CodecRow(accuracy=0.7, lost=0.0, error=0.0, ratio=0.01)


def leave(folder: Path, method: str, finals: list[float], ratio: float) -> None:
    for seed, final in enumerate(finals):
        result = {"quality": {"final": final}, "communication": {"ratio_to_dense": ratio}}
        cell = {"method": method, "settings": {"run": {"seed": seed}}, "result": result}
        (folder / f"{method}-seed{seed}.json").write_text(json.dumps(cell), encoding="utf-8")


def test_what_is_lost_is_compared_seed_by_seed(tmp_path: Path) -> None:
    leave(tmp_path, "float32", [0.5, 0.7, 0.9], 0.01)
    leave(tmp_path, "int4", [0.49, 0.68, 0.87], 0.001)  # 1, 2 and 3 points less
    leave(tmp_path, "eden-1", [0.5, 0.7], 0.0001)  # not all of it has been run
    rows = codec_rows(tmp_path)
    assert set(rows) == {"float32", "int4"}
    assert rows["int4"].lost == pytest.approx(0.02)
    assert rows["int4"].error == pytest.approx(0.01 / 3**0.5)


def test_the_cheapest_that_loses_nothing_to_speak_of_in_any_table_is_recommended() -> None:
    def row(lost: float, error: float, ratio: float) -> CodecRow:
        return CodecRow(0.7 - lost, lost, error, ratio)

    one = {
        "float32": SAFE,
        "a": row(0.0, 0.001, 0.004),
        "b": row(MOST_LOST, 0.0001, 0.001),  # more than is allowed, its error added
        "c": row(0.0, 0.0, 0.002),
    }
    other = {**one, "c": row(0.01, 0.0, 0.002)}  # loses there
    assert recommended([one, other]) == "a"
    assert recommended([one, one]) == "c"
    del other["a"]  # not run there
    assert recommended([one, other]) == "float32"
    assert "**a**" in as_text({"one": one, "other": {**other, "a": one["a"]}})[1]


def test_the_default_is_recommended_or_sends_less_and_loses_little_on_the_mean() -> None:
    def tables(lost: float, ratio: float) -> list[dict[str, CodecRow]]:
        default = CodecRow(0.7 - lost, lost, MOST_LOST, ratio)
        return [{"float32": SAFE, "a": CodecRow(0.7, 0.0, 0.0, 0.002), DEFAULT: default}] * 2

    assert default_stands(tables(0.0, 0.001))  # recommended
    assert default_stands(tables(MOST_LOST, 0.001))  # its standard error breaks the bound
    assert not default_stands(tables(2 * MOST_LOST, 0.001))
    assert not default_stands(tables(MOST_LOST, 0.003))


def test_the_job_of_make_run_sends_by_the_default_codec_which_stands() -> None:
    assert default_stands([codec_rows(BENCHMARKS / "results" / name / "final") for name in TABLES])
    table = read_grid(BENCHMARKS / "codecs.toml")
    [method] = [method for method in table.methods if method.name == DEFAULT]
    shipped = BENCHMARKS.parent / "simulations" / "experiments" / "film-reviews.toml"
    experiment = Experiment.from_file(shipped)
    assert Experiment.from_file(shipped, method.overrides).codec == experiment.codec
    assert experiment.codec == Experiment().codec
