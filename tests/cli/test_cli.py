"""Test what the command line says to a person: one sentence, and the right exit code."""

from __future__ import annotations

import json
import re
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


def row(**changes: object) -> list[dict[str, object]]:
    """One more than `ROWS`: the 41st."""
    return [{"text": "odd", "label": 1, "client": "c0", **changes}]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--set", "mask.densty=0.1"], r"unknown key in \[mask\]: 'densty'.*Known are:.*density"),
        (["--set", "masks.density=0.1"], "unknown table 'masks'"),
        (["--set", "mask.density=0"], r"must be in \(0, 1\].*half a percent"),
        (["--set", "mask.density=2"], r"must be in \(0, 1\].*half a percent"),
        (["--set", "strategy.num-rounds='ten'"], "num-rounds must be of type int, got 'ten'"),
        (["absent.toml"], "no experiment file 'absent.toml'"),
        (["absent"], "Known are:.*film-reviews"),
        (["--set", "data.source='./absent.jsonl'"], r"absent\.jsonl"),
        (
            ["--set", "backbone.model='nobody/nothing'"],
            "the hub could not give it.*Download it beforehand",
        ),
    ],
)
def test_a_run_that_cannot_be_is_refused_with_what_to_do(
    refused: Refusal, arguments: list[str], wanted: str
) -> None:
    assert re.search(wanted, refused("simulate", *arguments))


@pytest.mark.parametrize(
    ("more", "changes", "wanted"),
    [
        (
            [],
            ["data.text-columns=['sentence']"],
            "sentence.*(client, label, text|'text', 'label', 'client')",
        ),
        (row(label=7), ["data.label-names=['no','yes']"], "(?=.*7)(?=.*41)"),
        (row(client=""), [], "41"),
        ([], ["clients.min-rows=21"], "21"),
        ([], ["codec.uplink='morse'"], "float32"),
        ([], ["structure.preset='magic'"], "lnfit"),
    ],
)
def test_rows_or_settings_that_do_not_fit_them_are_refused_by_name(
    refused: Refusal, with_rows: Any, more: Any, changes: list[str], wanted: str
) -> None:
    assert re.search(wanted, refused(*with_rows([*ROWS, *more], *changes)))


def test_a_mask_of_a_hub_out_of_reach_is_refused(refused: Refusal) -> None:
    assert "nobody/nothing" in refused("mask", "nobody/nothing")


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
