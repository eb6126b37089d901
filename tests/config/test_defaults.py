"""The defaults of an experiment that names little."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_runs import make_result, to_text

from fedpet.config import CodecConfig, Experiment
from fedpet.config.builtin import load_experiment
from fedpet.report.run_table import run_table


def test_the_default_codec_is_the_one_of_the_default_job() -> None:
    assert CodecConfig() == load_experiment("film-reviews").codec


@pytest.mark.parametrize(("text", "name"), [("", "mine"), ('[run]\nname = "other"\n', "other")])
def test_a_run_is_named_by_its_file_where_nothing_names_it(
    tmp_path: Path, text: str, name: str
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text, encoding="utf-8")
    assert Experiment.from_file(file).run.name == name
    assert Experiment.from_file(file, ["run.name=set"]).run.name == "set"


def test_the_first_line_of_a_result_names_the_codec() -> None:
    result = make_result()
    first = to_text(run_table(result)).strip().splitlines()[0]
    assert first.endswith("dither-3 up, dither-5 down")
    del result["run"]["codec"]  # as an older fedpet wrote it
    assert "seed 0" in to_text(run_table(result))


def test_a_head_with_a_codec_of_its_own_is_named_too() -> None:
    codec = CodecConfig(uplink="eden-2", head_uplink="float32")
    assert str(codec) == "eden-2 (head float32) up, dither-5 down"
