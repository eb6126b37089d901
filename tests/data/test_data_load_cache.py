"""Loading once more: quick, the same bytes, and never what other settings had made."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_fixtures import TWO_OR_MORE, WORDS, save_tokenizer, some_rows, texts_of, write

import fedpet.data.tokenize as load_module
from fedpet.config import ClientsConfig, DataConfig
from fedpet.data import FederatedData, hash_tokenizer, load_data


def same(one: FederatedData, other: FederatedData) -> bool:
    return (
        one.task == other.task
        and one.tokenizer_hash == other.tokenizer_hash
        and all(
            a.tokens.tobytes() == b.tokens.tobytes()
            and a.offsets.tobytes() == b.offsets.tobytes()
            and a.labels.tobytes() == b.labels.tobytes()
            for a, b in ((one.train, other.train), (one.evaluation, other.evaluation))
        )
        and [(c.id, c.rows.tolist()) for c in one.clients]
        == [(c.id, c.rows.tolist()) for c in other.clients]
    )


@settings(max_examples=8)  # each reads a file: a quarter of a second
@given(seed=st.integers(0, 10**6), num_rows=st.integers(4, 30))
def test_a_second_start_gives_the_same_bytes_and_tokenises_nothing(
    tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory, seed: int, num_rows: int
) -> None:
    home = tmp_path_factory.mktemp("set")
    write(home / "train.jsonl", some_rows(num_rows, seed))
    data = DataConfig(source=str(home), eval_split="train")
    population = ClientsConfig(partition="dirichlet", num_clients=2, min_rows=1, seed=seed)
    first = load_data(data, population, tokenizer_folder, cache=home / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load_module, "tokenize_rows", None)  # not callable: a call would fail
        second = load_data(data, population, tokenizer_folder, cache=home / "cache")
    assert same(first, second)


def test_a_start_from_the_cache_imports_no_library_that_takes_seconds(
    folder: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    population = ClientsConfig(client_column="owner")
    load_data(DataConfig(source=str(folder)), population, tokenizer_folder, cache=cache)
    program = f"""
import sys
from pathlib import Path
from fedpet.config import DataConfig, ClientsConfig
from fedpet.data import load_data
data = DataConfig(source={str(folder)!r})
population = ClientsConfig(client_column="owner")
load_data(data, population, Path({str(tokenizer_folder)!r}), cache=Path({str(cache)!r}))
print(sorted({{"datasets", "pandas", "pyarrow", "transformers", "tokenizers"}} & set(sys.modules)))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_client_that_is_told_the_label_names_uses_what_the_server_stored(
    folder: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig(source=str(folder))
    server = load_data(data, TWO_OR_MORE, tokenizer_folder, cache=tmp_path / "cache")
    monkeypatch.setattr(load_module, "tokenize_rows", None)
    told = replace(data, label_names=server.task.label_names)
    client = load_data(told, TWO_OR_MORE, tokenizer_folder, cache=tmp_path / "cache")
    assert same(server, client)


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 9},
        {"label_names": ("yes", "no")},
        {"text_columns": ("other",)},
        {"max_train_rows": 20},
        {"eval_split": ""},
        {"label_column": "score", "task": "regression", "metric": "pearson"},
    ],
)
def test_a_setting_that_changes_a_row_is_never_answered_from_the_old_rows(
    folder: Path, tokenizer_folder: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    data = DataConfig(source=str(folder))
    changed = replace(data, **change)
    load_data(data, TWO_OR_MORE, tokenizer_folder, cache=tmp_path / "cache")
    after = load_data(changed, TWO_OR_MORE, tokenizer_folder, cache=tmp_path / "cache")
    fresh = load_data(changed, TWO_OR_MORE, tokenizer_folder, cache=tmp_path / "other cache")
    assert same(after, fresh)


def test_an_edited_file_is_read_again(folder: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    data = DataConfig(source=str(folder))
    load_data(data, TWO_OR_MORE, tokenizer_folder, cache=tmp_path / "cache")
    write(folder / "train.jsonl", some_rows(30, seed=9))
    after = load_data(data, TWO_OR_MORE, tokenizer_folder, cache=tmp_path / "cache")
    assert texts_of(after.train, tokenizer_folder) == [r["text"] for r in some_rows(30, seed=9)]


def test_another_tokeniser_makes_other_rows_and_has_another_hash(
    folder: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    other = save_tokenizer(tmp_path / "other", WORDS[::-1], pad_token="[PAD]")
    data = DataConfig(source=str(folder))
    first, second = (
        load_data(data, TWO_OR_MORE, one, cache=tmp_path / "cache")
        for one in (tokenizer_folder, other)
    )
    assert first.tokenizer_hash == hash_tokenizer(tokenizer_folder)
    assert first.tokenizer_hash != second.tokenizer_hash
    assert first.train.tokens.tolist() != second.train.tokens.tolist()
