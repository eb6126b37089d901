"""Classes and rows told: in order, before the first round, and nothing left out in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from in_process_run import run
from text_fixtures import TWO_OR_MORE, some_rows, write
from tiny import Silent, make_backbone, make_experiment, make_rows

from fedpet.client.node_config import NodeConfig
from fedpet.config import ClientsConfig, DataConfig
from fedpet.data import (
    ClassCount,
    FederatedData,
    count_classes,
    describe_classes,
    load_data,
    load_evaluation,
)
from fedpet.run.federate import federate, prepare
from fedpet.run.local_grid import LocalGrid
from fedpet.run.progress import LiveLine
from fedpet.run.run_folder import new_run_folder


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_backbone(tmp_path_factory.mktemp("backbone"))


class Heard(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def on_stage(self, text: str) -> None:
        if text == "starting the rounds":
            raise InterruptedError
        self.lines.append(text)


def test_classes_are_counted_by_the_rows_of_those_who_take_part(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    rows = some_rows(20)
    rows[0] |= {"owner": "alone", "label": "maybe"}
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "test.jsonl", some_rows(5))
    loaded = load_data(
        DataConfig(source=str(tmp_path)),
        ClientsConfig(client_column="owner", min_rows=2),
        tokenizer_folder,
        cache=tmp_path / "cache",
    )
    assert count_classes(loaded) == (
        ClassCount("maybe", 0, 0, 0),
        ClassCount("no", 9, 3, 5),
        ClassCount("yes", 10, 2, 5),
    )
    assert describe_classes(count_classes(loaded), trained_here=True) == [
        "Classes (rows to train on + to evaluate on): 0 = 'maybe' (0 + 0), 1 = 'no' (9 + 3), "
        "2 = 'yes' (10 + 2).",
        "Warning: no row at all for the class 'maybe'.",
    ]


def test_names_that_differ_in_blanks_or_capitals_and_classes_of_one_split_are_warned_of() -> None:
    classes = [
        ClassCount("Neg", 4, 2, 1),
        ClassCount("neg", 4, 0, 1),
        ClassCount("neg ", 0, 2, 0),
        ClassCount("pos", 4, 2, 1),
    ]
    _, *warnings = describe_classes(classes, trained_here=True)
    assert warnings == [
        "Warning: the classes 'Neg', 'neg', 'neg ' differ in blanks or capitals alone. If they "
        "are one, mend the labels.",
        "Warning: no row to train on for the class 'neg '.",
        "Warning: no row to evaluate on for the class 'neg'.",
    ]


def test_a_hundred_and_fifty_classes_are_told_in_short() -> None:
    classes = [ClassCount(f"intent {i}", i % 2, 0, 1) for i in range(150)]
    lines = describe_classes(classes, trained_here=True)
    assert lines[0].endswith("9 = 'intent 9' (1 + 0) and 140 more.")
    assert all(len(line) < 450 for line in lines)


def test_a_server_without_training_rows_warns_of_its_own_rows_alone(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    write(tmp_path / "test.jsonl", some_rows(6))
    data = DataConfig(source=str(tmp_path), label_names=("no", "yes", "maybe"))
    loaded = load_evaluation(data, tokenizer_folder, cache=tmp_path / "cache")
    assert describe_classes(count_classes(loaded), trained_here=False) == [
        "Classes (rows to evaluate on): 0 = 'no' (3), 1 = 'yes' (3), 2 = 'maybe' (0).",
        "Warning: no row to evaluate on for the class 'maybe'.",
    ]


def test_a_regression_has_no_classes(tokenizer_folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", some_rows(20))
    data = DataConfig(
        source=str(tmp_path / "a.jsonl"), task="regression", metric="pearson", label_column="score"
    )
    loaded = load_data(data, TWO_OR_MORE, tokenizer_folder, cache=tmp_path / "cache")
    assert describe_classes(count_classes(loaded), trained_here=True) == []


def test_a_sentence_stays_in_a_terminal_above_the_line_that_is_redrawn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with LiveLine(3) as line:
        line.on_stage("Classes: 0 = '[no]'.")
        line.on_stage("loading the backbone")
    assert "Classes: 0 = '[no]'.\n" in capsys.readouterr().err


def test_a_run_tells_its_classes_before_it_trains_and_leaves_them_with_its_rows(
    backbone: Path, tmp_path: Path
) -> None:
    rows = make_rows(tmp_path / "rows")
    experiment = make_experiment(backbone, rows, tmp_path / "out", strategy_num_rounds=1)
    heard = Heard()
    prepared = prepare(experiment, heard)
    assert heard.lines[1] == (
        "Classes (rows to train on + to evaluate on): 0 = '0' (36 + 17), 1 = '1' (36 + 23)."
    )
    grid, out = LocalGrid.of(NodeConfig.from_experiment(experiment), 1), new_run_folder(experiment)
    with pytest.raises(InterruptedError):
        federate(grid, prepared, out, heard)
    classes = json.loads((out.path / "classes.json").read_text(encoding="utf-8"))
    (out.path / "config.toml").unlink()
    run(experiment)
    told = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))["data"]
    assert (
        told["classes"]
        == classes
        == [
            {"name": "0", "train_rows": 36, "evaluation_rows": 17, "clients": 6},
            {"name": "1", "train_rows": 36, "evaluation_rows": 23, "clients": 6},
        ]
    )
    assert told["rows"] == {
        "train": {"read": 72, "used": 72, "left_out": {}},
        "evaluation": {"read": 40, "used": 40, "left_out": {}},
    }


# Rows read, used and left out.


def add_up(data: FederatedData) -> dict[str, tuple[int, int, dict[str, int]]]:
    for books in data.books.values():
        assert books.used + sum(books.left_out.values()) == books.read
    return {split: (b.read, b.used, dict(b.left_out)) for split, b in data.books.items()}


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv", "a.parquet", "a.arrow"])
def test_rows_read_used_and_left_out_add_up_in_every_format_from_the_cache_as_well(
    tokenizer_folder: Path, tmp_path: Path, name: str
) -> None:
    dataset = Dataset.from_list(some_rows(60))
    match name.partition(".")[2]:
        case "jsonl":
            dataset.to_json(tmp_path / name)
        case "parquet":
            dataset.to_parquet(tmp_path / name)
        case "arrow":
            dataset.save_to_disk(str(tmp_path / "saved"))
            (tmp_path / "saved" / "data-00000-of-00001.arrow").rename(tmp_path / name)
        case "csv":
            dataset.to_csv(tmp_path / name)
        case _:
            dataset.to_csv(tmp_path / name, sep="\t")
    data = DataConfig(source=str(tmp_path / name), max_train_rows=40, max_eval_rows=5)
    population = ClientsConfig(client_column="owner", min_rows=8)
    for _ in range(2):
        loaded = load_data(data, population, tokenizer_folder, cache=tmp_path / "cache")
        told = add_up(loaded)
        assert told["train"][0] == told["evaluation"][0] == 60
        assert told["train"][1] == sum(len(client.rows) for client in loaded.clients)
        assert told["evaluation"][1:] == (
            5,
            {"kept to train on": told["evaluation"][2]["kept to train on"]}
            | {"beyond data.max-eval-rows": told["train"][2]["held out to evaluate on"] - 5},
        )
        assert set(told["train"][2]) <= {
            "held out to evaluate on",
            "beyond data.max-train-rows",
            "of clients below clients.min-rows",
        }


def test_rows_that_a_partitioner_gives_to_nobody_are_told_apart(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    class First:
        dataset: Any = None
        num_partitions = 2

        def load_partition(self, partition_id: int) -> Any:
            return self.dataset.select([[0, 1, 2, 3], [4]][partition_id])

    write(tmp_path / "train.jsonl", some_rows(10))
    loaded = load_data(
        DataConfig(source=str(tmp_path), eval_split="train"),
        TWO_OR_MORE,
        tokenizer_folder,
        cache=tmp_path / "cache",
        partitioner=First(),
    )
    left_out = {"of no client": 5, "of clients below clients.min-rows": 1}
    assert add_up(loaded)["train"] == (10, 4, left_out)
