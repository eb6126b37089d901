"""The grid of learning rates: small clients, points around the automatic rates, an honest table."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import rate_rows
from benchmarks.rate_grid import RateCell, as_text, cell_of, remember
from benchmarks.rate_rows import ROWS, write_rows
from fedpet.errors import ConfigError

RATES = {"mask": 0.03, "head": 0.02}


def write_source(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    own = folder / rate_rows.SOURCES[name].folder
    own.mkdir(parents=True)
    for split in ("train", "test"):
        with gzip.open(own / f"{split}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_film_is_one_small_client_or_is_validated_on(tmp_path: Path) -> None:
    rows = [
        {"text": f"{movie} {number}", "label": number % 2, "movie": f"film {movie}"}
        for movie in range(50)
        for number in range(45)
    ]
    write_source(tmp_path, "films", rows)
    write_rows(tmp_path, "films", tmp_path / "out")
    trained = read(tmp_path / "out" / "train.jsonl")
    held = {row["text"].split()[0] for row in read(tmp_path / "out" / "validation.jsonl")}
    clients = [row["client"] for row in trained]
    assert {clients.count(client) for client in clients} == {ROWS}
    assert held.isdisjoint(row["text"].split()[0] for row in trained)


def test_rows_without_clients_are_dealt_out_with_few_classes_each(tmp_path: Path) -> None:
    rows = [{"text": f"text {number}", "label": f"class {number % 20}"} for number in range(3000)]
    write_source(tmp_path, "banking77", rows)
    write_rows(tmp_path, "banking77", tmp_path / "out")
    labels: dict[str, list[str]] = {}
    for row in read(tmp_path / "out" / "train.jsonl"):
        labels.setdefault(row["client"], []).append(row["label"])
    assert max(map(len, labels.values())) <= ROWS
    assert np.mean([len(set(own)) for own in labels.values()]) < 10


def test_a_folder_without_the_sets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--data"):
        write_rows(tmp_path, "cola", tmp_path / "out")


def result(validation: float, test: float) -> dict[str, Any]:
    return {
        name: {"accuracy": accuracy, "loss": 0.5, "majority": 0.5}
        for name, accuracy in (("validation", validation), ("test", test))
    }


def cell(folder: Path, rates: dict[str, float]) -> RateCell:
    return cell_of((folder, Path("data")), "films", "mask", rates)


def test_the_best_is_chosen_on_validation_rows_and_reported_on_test_rows(tmp_path: Path) -> None:
    own = cell(tmp_path, RATES)
    own.write(result(0.70, 0.72))
    cell(tmp_path, {**RATES, "mask": 0.09}).write(result(0.75, 0.725))
    cell(tmp_path, {**RATES, "mask": 0.01}).write(result(0.60, 0.90))
    remember(tmp_path, [own])
    *_, row, _, said = as_text(tmp_path).splitlines()
    shown = [part.strip() for part in row.strip("|").split("|")]
    assert shown[:8] == ["films", "mask", "accuracy", "3", "0.500", "0.720", "0.725", "-0.5"]
    assert shown[8] == "mask 0.09, head 0.02"
    assert said.endswith("or above it, on 1 of 1 data sets.")
    assert own.read() == result(0.70, 0.72)


def test_a_cell_of_before_is_one_of_accuracy(tmp_path: Path) -> None:
    own = cell(tmp_path, RATES)
    own.write(result(0.70, 0.72))
    content = json.loads(own.path.read_text())
    del content["settings"]["data"]["metric"]
    own.path.write_text(json.dumps(content))
    assert own.read() == result(0.70, 0.72)
    other = cell_of((tmp_path, Path("data")), "cola", "mask", RATES)
    content["settings"]["data"] = {"folder": "cola", "column": "source", "test": "validation"}
    other.path.parent.mkdir(parents=True)
    other.path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="metric was 'accuracy', is 'matthews'"):
        other.read()
