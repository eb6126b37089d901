"""`fedpet export`: what it writes, what it says, and with which exit code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import in_process_run
import pytest
import tiny
from huggingface_hub import constants

Command = Callable[..., tuple[Any, str, str]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two runs: of a mask and norms, and of a mask and biases."""
    folder = tmp_path_factory.mktemp("runs")
    backbone, rows = tiny.make_backbone(folder / "bert"), tiny.make_rows(folder / "rows")
    for name, preset in (("norms", "lnfit"), ("biases", "bitfit")):
        in_process_run.run(
            tiny.make_experiment(
                backbone, rows, folder / name, strategy_num_rounds=1, structure_preset=preset
            )
        )
    return folder


@pytest.fixture
def command(command: Command) -> Command:
    def export(*arguments: str) -> tuple[int, str, str]:
        code, said, printed = command("export", *arguments)
        return code, " ".join(said.split()), printed

    return export


def test_both_formats_are_written_and_named(runs: Path, command: Command, tmp_path: Path) -> None:
    code, _, printed = command(str(runs / "norms"), "--format", "peft", "--out", "adapter")
    assert (code, printed.strip()) == (0, "Adapter of peft: adapter")
    code, _, printed = command(str(runs / "norms"), "--out", "plain")
    assert (code, printed.strip()) == (0, "Plain model: plain")
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/[!.]*")}
    assert {"adapter/adapter_config.json", "adapter/README.md"} < found
    assert {"plain/config.json", "plain/model.safetensors", "plain/README.md"} < found


def test_what_is_not_possible_is_one_sentence_and_exit_code_2(
    runs: Path, command: Command, tmp_path: Path
) -> None:
    code, said, _ = command(str(runs / "norms"), "--format", "onnx", "--out", "x")
    assert code == 2
    assert "must be one of merged, peft, got 'onnx'" in said
    code, said, _ = command(str(runs / "biases"), "--format", "peft", "--out", "x")
    assert code == 2
    assert "no place for the bias" in said
    assert "--format merged" in said
    assert not (tmp_path / "x").exists()


def test_an_upload_that_cannot_be_leaves_the_folder_and_exits_with_1(
    runs: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    given = ("--format", "peft", "--out", "adapter", "--push-to-hub", "me/it")
    code, said, printed = command(str(runs / "norms"), *given)
    assert code == 1
    assert "was not uploaded to 'me/it': HF_HUB_OFFLINE is set" in said
    assert "Adapter of peft: adapter" in printed
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
