"""Test what the command line says to a person: one sentence, and the right exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import typer

from fedpet.cli import main

Refusal = Callable[..., str]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_backbone(tmp_path_factory.mktemp("tiny") / "backbone")


@pytest.fixture
def with_rows(tmp_path: Path, backbone: Path) -> Callable[..., list[str]]:
    """Arguments of a run on rows that a test writes."""

    def make(rows: list[dict[str, object]], *sets: str) -> list[str]:
        folder = tmp_path / "rows"
        folder.mkdir()
        text = "".join(json.dumps(row) + "\n" for row in rows)
        for split in ("train", "test"):
            (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
        keys = [
            f"data.source='{folder}'",
            f"backbone.model='{backbone}'",
            f"run.cache='{tmp_path / 'cache'}'",
            *sets,
        ]
        return ["simulate", *(part for key in keys for part in ("--set", key))]

    return make


ROWS: list[dict[str, object]] = [
    {"text": f"good film {i}", "label": i % 2, "client": f"c{i % 2}"} for i in range(40)
]


def test_an_unknown_key_is_refused_with_the_known_ones(refused: Refusal) -> None:
    said = refused("simulate", "--set", "mask.densty=0.1")
    assert "unknown key in [mask]: 'densty'" in said
    assert "density" in said.split("Known are:")[1]


def test_an_unknown_table_is_refused(refused: Refusal) -> None:
    assert "unknown table 'masks'" in refused("simulate", "--set", "masks.density=0.1")


@pytest.mark.parametrize("density", ["0", "2"])
def test_a_density_outside_its_range_is_refused(refused: Refusal, density: str) -> None:
    said = refused("simulate", "--set", f"mask.density={density}")
    assert "must be in (0, 1]" in said
    assert "half a percent" in said


def test_a_value_of_the_wrong_type_is_refused(refused: Refusal) -> None:
    said = refused("simulate", "--set", "strategy.num-rounds='ten'")
    assert "strategy.num-rounds must be of type int, got 'ten'" in said


def test_an_absent_experiment_is_refused(refused: Refusal) -> None:
    assert "no experiment file 'absent.toml'" in refused("simulate", "absent.toml")
    assert "film-reviews" in refused("simulate", "absent").split("Known are:")[1]


def test_a_missing_column_is_refused_with_those_there_are(
    refused: Refusal, with_rows: Callable[..., list[str]]
) -> None:
    said = refused(*with_rows(ROWS, "data.text-columns=['sentence']"))
    assert "sentence" in said
    assert "client, label, text" in said or "'text', 'label', 'client'" in said


def test_a_label_outside_the_classes_is_refused_with_its_row(
    refused: Refusal, with_rows: Callable[..., list[str]]
) -> None:
    rows = [*ROWS, {"text": "odd", "label": 7, "client": "c0"}]
    said = refused(*with_rows(rows, "data.label-names=['no','yes']"))
    assert "7" in said
    assert "41" in said


def test_a_row_whose_client_is_empty_is_refused(
    refused: Refusal, with_rows: Callable[..., list[str]]
) -> None:
    rows = [*ROWS, {"text": "whose", "label": 1, "client": ""}]
    assert "41" in refused(*with_rows(rows))


def test_clients_with_too_few_rows_leave_nobody(
    refused: Refusal, with_rows: Callable[..., list[str]]
) -> None:
    said = refused(*with_rows(ROWS, "clients.min-rows=21"))
    assert "21" in said


def test_an_absent_file_of_rows_is_refused(refused: Refusal) -> None:
    said = refused("simulate", "--set", "data.source='./absent.jsonl'")
    assert "absent.jsonl" in said


def test_a_hub_out_of_reach_is_refused_with_what_to_do(refused: Refusal) -> None:
    said = refused("simulate", "--set", "backbone.model='nobody/nothing'")
    assert "the hub could not give it" in said
    assert "Download it beforehand" in said
    assert "nobody/nothing" in refused("mask", "nobody/nothing")


def test_an_unknown_codec_is_refused(refused: Refusal, with_rows: Callable[..., list[str]]) -> None:
    assert "float32" in refused(*with_rows(ROWS, "codec.uplink='morse'"))


def test_an_unknown_preset_is_refused(
    refused: Refusal, with_rows: Callable[..., list[str]]
) -> None:
    assert "lnfit" in refused(*with_rows(ROWS, "structure.preset='magic'"))


def test_a_folder_that_holds_a_run_is_not_overwritten(
    refused: Refusal, with_rows: Callable[..., list[str]], tmp_path: Path
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.toml").write_text("")
    said = refused(*with_rows(ROWS), "--out", str(tmp_path / "old"))
    assert "holds a run already" in said


def test_merging_what_is_no_run_is_refused(refused: Refusal, tmp_path: Path) -> None:
    assert "no folder of a finished run" in refused("merge", str(tmp_path), "--out", "model")


def test_comparing_what_is_no_run_is_refused(refused: Refusal, tmp_path: Path) -> None:
    assert str(tmp_path) in refused("compare", str(tmp_path))


def test_an_unknown_option_exits_with_2(command: Any) -> None:
    code, said, _ = command("simulate", "--nope")
    assert code == 2
    assert "--nope" in said


@pytest.mark.parametrize("name", ["simulate", "mask", "search", "merge", "compare", "report"])
def test_every_command_has_help_with_an_example(command: Any, name: str) -> None:
    assert f"Example: fedpet {name}" in command(name, "--help")[2]


def test_every_argument_and_option_says_what_it_is() -> None:
    for name, command in typer.main.get_command(main.app).commands.items():  # type: ignore[attr-defined]
        for parameter in command.params:
            assert parameter.help, f"{name} {parameter.name}"


def test_the_mask_command_shows_the_bound_and_keeps_within_it(
    command: Any, backbone: Path, tmp_path: Path
) -> None:
    file = tmp_path / "mask.bin"
    _, _, printed = command("mask", str(backbone), "--density", "0.05", "--out", str(file))
    assert "entropy" in printed
    assert file.stat().st_size > 0
