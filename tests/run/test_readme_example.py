"""The example of the README's first screen, word for word, on the bundled model and reviews."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from datasets import DatasetDict
from doc_blocks import blocks_of, run_python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fedpet
from fedpet.config import Experiment

pytestmark = [pytest.mark.simulation, pytest.mark.timeout(900)]

README = Path(__file__).parents[2] / "README.md"
BLOCKS = [block for block in blocks_of(README) if block.language == "python"]


def check_same_job_by_file(run: fedpet.Run, data: dict[str, Any], folder: Path) -> None:
    """The job by an experiment file, in this process, over rows that `data` names."""
    tables = Experiment.from_file(run.folder / "config.toml").to_tables()
    tables["data"] |= {"eval-split": "test", "train-split": "train", **data}
    tables["run"] |= {"name": "by-file", "out": str(folder)}
    file = folder.with_suffix(".toml")
    file.write_text(tomli_w.dumps(tables), encoding="utf-8")
    other = fedpet.simulate(file, backend="in-process", progress=False)
    assert other.result["final_values_sha256"] == run.result["final_values_sha256"]


def check_saved(run: fedpet.Run, folder: str) -> None:
    saved = AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
    plain = AutoModelForSequenceClassification.from_pretrained(run.folder / "model").state_dict()
    assert all(torch.equal(saved[key], plain[key]) for key in plain)
    assert 0.3 < run.metrics["accuracy"] < 1


def write_rows(splits: DatasetDict, folder: Path) -> dict[str, Any]:
    """The rows as files; how an experiment names them."""
    folder.mkdir()
    for split in splits:
        splits[split].to_json(folder / f"{split}.jsonl")
    return {"source": str(folder), "label-names": ["rotten", "fresh"]}


def test_the_example_equals_the_job_by_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    names = run_python(README, BLOCKS)
    assert "trainable params" in capsys.readouterr().out
    check_saved(names["run"], names["folder"])
    check_same_job_by_file(names["run"], write_rows(names["ds"], tmp_path / "rows"), tmp_path / "f")


@pytest.mark.slow
def test_the_example_word_for_word_equals_the_job_by_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    [example] = [block.code for block in BLOCKS if block.marker]
    name, reviews = fedpet.bundled_model(), fedpet.bundled_reviews()
    reviews.pop("validation")
    names: dict[str, Any] = {"name": name, "ds": reviews, "folder": "out"}
    names["tok"] = AutoTokenizer.from_pretrained(name)
    exec(compile(example, str(README), "exec"), names)
    check_saved(names["run"], "out")
    check_same_job_by_file(names["run"], write_rows(reviews, tmp_path / "rows"), tmp_path / "f")
