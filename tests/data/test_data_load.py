"""From a file to clients: what is loaded is what stands there, but for what is held out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset
from hypothesis import given
from hypothesis import strategies as st
from text_fixtures import TWO_OR_MORE, WORDS, save_tokenizer, some_rows, texts_of, write
from transformers import AutoTokenizer

from fedpet.config import ClientsConfig, DataConfig
from fedpet.data import load_data
from fedpet.data.row_hash import choose_rows, hash_rows, hold_out
from fedpet.errors import DataError

# What is loaded.


@pytest.mark.parametrize("pair", [False, True])
def test_a_row_holds_exactly_what_the_tokeniser_makes_of_its_text(
    folder: Path, tokenizer_folder: Path, tmp_path: Path, pair: bool
) -> None:
    columns = ("text", "other") if pair else ("text",)
    data = DataConfig(source=str(folder), text_columns=columns, max_length=16)
    loaded = load_data(data, TWO_OR_MORE, tokenizer_folder, cache=tmp_path / "cache")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    for i, row in enumerate(some_rows(40)):
        expected = tokenizer(*(row[name] for name in columns), truncation=True, max_length=16)
        batch = loaded.train.batch(np.array([i]))
        assert batch["input_ids"][0].tolist() == expected["input_ids"]
        assert batch["token_type_ids"][0].tolist() == expected["token_type_ids"]
        assert batch["labels"].tolist() == [["no", "yes"].index(row["label"])]
    assert loaded.train.lengths.max() <= 16
    assert loaded.train.pad_id == 0
    assert loaded.task.label_names == ("no", "yes")
    assert (len(loaded.train), len(loaded.evaluation)) == (40, 12)


def test_a_regression_has_float_labels_and_no_label_names(
    folder: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    data = DataConfig(source=str(folder), label_column="score", task="regression", metric="pearson")
    loaded = load_data(data, TWO_OR_MORE, tokenizer_folder, cache=tmp_path / "cache")
    assert loaded.train.labels.dtype == np.float32
    assert loaded.train.labels.tolist() == [i / 4 for i in range(40)]
    assert (loaded.task.kind, loaded.task.num_outputs) == ("regression", 1)


def test_natural_clients_own_the_rows_that_name_them(
    folder: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    population = ClientsConfig(client_column="owner")
    data = DataConfig(source=str(folder))
    for _ in range(2):  # read, and from the cache
        loaded = load_data(data, population, tokenizer_folder, cache=tmp_path / "cache")
        assert {client.id: client.rows.tolist() for client in loaded.clients} == {
            f"owner {k}": list(range(k, 40, 5)) for k in range(5)
        }
        assert (loaded.left_out_clients, loaded.left_out_rows) == (0, 0)


def test_a_client_below_the_least_number_of_rows_is_left_out_and_counted(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    rows = [
        {**row, "owner": "large" if i < 27 else f"small {i % 2}"}
        for i, row in enumerate(some_rows(40))
    ]
    write(tmp_path / "set" / "train.jsonl", rows)
    loaded = load_data(
        DataConfig(source=str(tmp_path / "set"), eval_split="train"),
        ClientsConfig(client_column="owner", min_rows=8),
        tokenizer_folder,
        cache=tmp_path / "cache",
    )
    assert [client.id for client in loaded.clients] == ["large"]
    assert (loaded.left_out_clients, loaded.left_out_rows) == (2, 13)


def test_a_partitioner_from_outside_sees_all_columns_and_deals_out_the_rows(
    folder: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    class ByOwner:
        dataset: Any = None
        num_partitions = 5

        def load_partition(self, partition_id: int) -> Any:
            owners = np.array(self.dataset["owner"][:])
            return self.dataset.select(np.flatnonzero(owners == f"owner {partition_id}"))

    data = DataConfig(source=str(folder), max_train_rows=30)
    for _ in range(2):
        loaded = load_data(
            data, TWO_OR_MORE, tokenizer_folder, cache=tmp_path / "cache", partitioner=ByOwner()
        )
        natural = load_data(
            data,
            ClientsConfig(client_column="owner", min_rows=2),
            tokenizer_folder,
            cache=tmp_path / "cache",
        )
        assert [client.rows.tolist() for client in loaded.clients] == [
            client.rows.tolist() for client in natural.clients
        ]


@pytest.mark.parametrize(
    ("configured", "names", "labels"),
    [((), ("rotten", "fresh"), [1, 0, 1]), (("fresh", "rotten"), ("fresh", "rotten"), [0, 1, 0])],
)
def test_classes_that_the_source_names_keep_its_order_unless_another_is_configured(
    tokenizer_folder: Path,
    tmp_path: Path,
    configured: tuple[str, ...],
    names: tuple[str, ...],
    labels: list[int],
) -> None:
    rows = [{"text": "w1", "label": label} for label in (1, 0, 1)]
    classes = ClassLabel(names=["rotten", "fresh"])
    (tmp_path / "set").mkdir()
    dataset = Dataset.from_list(rows).cast_column("label", classes)
    dataset.to_parquet(str(tmp_path / "set" / "train.parquet"))
    loaded = load_data(
        DataConfig(source=str(tmp_path / "set"), eval_split="train", label_names=configured),
        ClientsConfig(partition="iid", num_clients=1, min_rows=1),
        tokenizer_folder,
        cache=tmp_path / "cache",
    )
    assert loaded.task.label_names == names
    assert loaded.train.labels.tolist() == labels


def test_a_tokeniser_without_padding_fills_up_with_its_end_token(
    folder: Path, tmp_path: Path
) -> None:
    bare = save_tokenizer(tmp_path / "bare", WORDS, eos_token="[SEP]")
    loaded = load_data(DataConfig(source=str(folder)), TWO_OR_MORE, bare, cache=tmp_path / "cache")
    assert loaded.train.pad_id == 3


# Held-out rows, and limits.


@given(
    texts=st.lists(st.text(max_size=4), min_size=1, max_size=60),
    fraction=st.floats(0.01, 0.99),
    max_rows=st.integers(0, 70),
)
def test_kept_and_held_out_rows_share_nothing_and_are_all(
    texts: list[str], fraction: float, max_rows: int
) -> None:
    kept, held = hold_out([texts], fraction)
    assert sorted([*kept, *held]) == list(range(len(texts)))
    assert not {texts[i] for i in kept} & {texts[i] for i in held}
    fewer = choose_rows(len(texts), hash_rows([texts]), "kept", fraction, max_rows)
    assert len(fewer) == (min(max_rows, len(kept)) if max_rows else len(kept))
    assert set(fewer) <= set(kept)
    assert (np.diff(fewer) > 0).all()


def test_the_held_out_fraction_is_about_the_one_asked_for() -> None:
    texts = [f"text {i}" for i in range(4000)]
    assert len(hold_out([texts], 0.2)[1]) == pytest.approx(800, abs=80)


@pytest.mark.parametrize("one_file", [True, False])
def test_rows_are_held_out_of_one_file_or_where_no_evaluation_split_is_named(
    folder: Path, tokenizer_folder: Path, tmp_path: Path, one_file: bool
) -> None:
    data = (
        DataConfig(source=str(folder / "train.jsonl"))
        if one_file
        else DataConfig(source=str(folder), eval_split="")
    )
    loaded = load_data(data, TWO_OR_MORE, tokenizer_folder, cache=tmp_path / "cache")
    texts = [texts_of(rows, tokenizer_folder) for rows in (loaded.train, loaded.evaluation)]
    assert sorted(texts[0] + texts[1]) == sorted(row["text"] for row in some_rows(40))
    assert not set(texts[0]) & set(texts[1])


def test_limits_take_that_many_rows(folder: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    data = DataConfig(source=str(folder), max_train_rows=15, max_eval_rows=3)
    loaded = load_data(data, TWO_OR_MORE, tokenizer_folder, cache=tmp_path / "cache")
    assert (len(loaded.train), len(loaded.evaluation)) == (15, 3)
    assert max(client.rows.max() for client in loaded.clients) < 15


@pytest.mark.parametrize("eval_split", ["test", ""])
def test_training_rows_are_the_same_with_and_without_evaluation_rows(
    folder: Path, tokenizer_folder: Path, tmp_path: Path, eval_split: str
) -> None:
    data = DataConfig(source=str(folder), eval_split=eval_split)
    with_rows, without = (
        load_data(
            data, TWO_OR_MORE, tokenizer_folder, cache=tmp_path / str(wanted), evaluation=wanted
        )
        for wanted in (True, False)
    )
    np.testing.assert_array_equal(with_rows.train.tokens, without.train.tokens)
    assert len(with_rows.evaluation) > 0
    assert len(without.evaluation) == 0


def test_a_device_without_an_evaluation_split_can_load_its_training_rows(
    folder: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    (folder / "test.jsonl").unlink()
    data = DataConfig(source=str(folder))
    loaded = load_data(
        data, TWO_OR_MORE, tokenizer_folder, cache=tmp_path / "cache", evaluation=False
    )
    assert len(loaded.train) == 40
    with pytest.raises(DataError, match="has no split 'test'"):
        load_data(data, TWO_OR_MORE, tokenizer_folder, cache=tmp_path / "cache")
