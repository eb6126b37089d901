"""`fedpet init`: an experiment for data that nobody has described."""

from __future__ import annotations

import csv
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from fedpet.config import Experiment
from fedpet.run.prepare import prepare

Rows = list[dict[str, Any]]

WORDS = [
    "the",
    "plot",
    "of",
    "this",
    "film",
    "was",
    "quite",
    "slow",
    "and",
    "the",
    "music",
    "rather",
    "dull",
]


def reviews(count: int = 80, **more: Callable[[int], Any]) -> Rows:
    def row(i: int) -> dict[str, Any]:
        text = " ".join(WORDS[i % 5 : 5 + i % 8]) + f" {i}"
        return {"review": text, "verdict": ("bad", "good")[i % 2]} | {
            name: make(i) for name, make in more.items()
        }

    return [row(i) for i in range(count)]


def write(path: Path, rows: Rows) -> Path:
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def fedpet(command: Any) -> Callable[..., tuple[int, str]]:
    """Run a command in an empty folder; give the exit code and all that it printed."""

    def run(*arguments: str) -> tuple[int, str]:
        code, said, printed = command(*arguments)
        return code, printed + said

    return run


def made(folder: Path, name: str = "reviews.toml") -> Experiment:
    return Experiment.from_file(folder / name)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_it_finds_text_label_and_clients(fedpet: Any, tmp_path: Path, suffix: str) -> None:
    rows = reviews(number=lambda i: i, user_id=lambda i: f"u{i % 4}")
    code, said = fedpet("init", str(write(tmp_path / f"reviews{suffix}", rows)))
    assert code == 0, said
    found = made(tmp_path)
    assert found.data.text_columns == ("review",)
    assert found.data.label_column == "verdict"
    assert (found.clients.partition, found.clients.client_column) == ("column", "user_id")
    assert found.data.eval_split == ""
    assert "fedpet simulate reviews.toml" in said
    assert (tmp_path / "reviews.toml").read_text().count("#") > 8


def test_without_a_client_column_clients_are_made(fedpet: Any, tmp_path: Path) -> None:
    fedpet("init", str(write(tmp_path / "reviews.csv", reviews())))
    found = made(tmp_path)
    assert found.clients.partition == "dirichlet"
    assert found.clients.num_clients == 4
    assert found.strategy.clients_per_round <= found.clients.num_clients


def test_pairs_and_numbers_to_predict_are_found(fedpet: Any, tmp_path: Path) -> None:
    rows = [
        {"Sentence1": f"a man {i}", "Sentence2": f"one man {i}", "score": i / 7} for i in range(60)
    ]
    fedpet("init", str(write(tmp_path / "pairs.csv", rows)))
    found = made(tmp_path, "pairs.toml")
    assert found.data.text_columns == ("Sentence1", "Sentence2")
    assert (found.data.task, found.data.metric) == ("regression", "pearson")
    assert found.clients.partition == "iid"


def test_a_folder_s_own_split_is_evaluated_on(fedpet: Any, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for split in ("train", "dev"):
        write(tmp_path / "set" / f"{split}.jsonl", reviews())
    fedpet("init", "set")
    found = made(tmp_path, "set.toml")
    assert found.data.eval_split == "dev"
    assert Path(found.data.source) == tmp_path / "set"  # wherever it is run


@pytest.mark.parametrize("client", [True, False])
def test_the_file_it_writes_runs(fedpet: Any, tmp_path: Path, client: bool) -> None:
    rows = reviews(author=lambda i: f"a{i % 5}") if client else reviews()
    fedpet("init", str(write(tmp_path / "reviews.csv", rows)))
    backbone = tiny.make_backbone(tmp_path / "backbone")
    overrides = [f"backbone.model='{backbone}'", f"run.cache='{tmp_path / 'cache'}'"]
    settings = Experiment.from_file(tmp_path / "reviews.toml", overrides)
    prepared = prepare(settings, tiny.Silent())
    assert len(prepared.data.clients) == (5 if client else 4)
    assert prepared.data.task.label_names == ("bad", "good")


def test_it_overwrites_nothing(fedpet: Any, tmp_path: Path) -> None:
    write(tmp_path / "reviews.csv", reviews())
    (tmp_path / "reviews.toml").write_text("mine")
    code, said = fedpet("init", "reviews.csv")
    assert code == 2
    assert "is there already: name another with --out" in said
    assert (tmp_path / "reviews.toml").read_text() == "mine"
    assert fedpet("init", "reviews.csv", "--out", "other.toml")[0] == 0


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"a": i, "b": i} for i in range(20)], "looks like text: name one with --text-column"),
        ([{"text": f"a b c {i}"} for i in range(20)], "looks like a label"),
        ([{"text": f"a b c {i}", "label": 1} for i in range(20)], "has 1 class"),
    ],
)
def test_data_without_a_text_or_a_label_is_refused(
    fedpet: Any, tmp_path: Path, rows: Rows, words: str
) -> None:
    code, said = fedpet("init", str(write(tmp_path / "data.jsonl", rows)))
    assert code == 2
    assert words in said
    assert not (tmp_path / "data.toml").exists()


def test_columns_can_be_named_and_unknown_ones_are_refused(fedpet: Any, tmp_path: Path) -> None:
    rows = reviews(ward=lambda i: f"w{i % 3}", summary=lambda i: "a short text here")
    write(tmp_path / "reviews.csv", rows)
    named = ("--text-column", "summary", "--client-column", "ward")
    assert fedpet("init", "reviews.csv", *named)[0] == 0
    assert made(tmp_path).data.text_columns == ("summary",)
    assert made(tmp_path).clients.client_column == "ward"
    code, said = fedpet("init", "reviews.csv", "--out", "b.toml", "--label-column", "verdcit")
    assert (code, "no column 'verdcit'. It has 'review'" in said) == (2, True)


def test_absent_data_is_refused(fedpet: Any) -> None:
    code, said = fedpet("init", "absent.csv")
    assert (code, "there is no file or folder 'absent.csv'" in said) == (2, True)


def test_names_that_toml_must_quote_come_back(fedpet: Any, tmp_path: Path) -> None:
    rows = [
        {'te"xt \\ü': row["review"] + " and more words", "label": row["verdict"]}
        for row in reviews()
    ]
    fedpet("init", str(write(tmp_path / "a b.jsonl", rows)))
    tables = tomllib.loads((tmp_path / "a b.toml").read_text(encoding="utf-8"))
    assert tables["data"]["text-columns"] == ['te"xt \\ü']
