"""Rows of a federation from memory, files, and foreign partitioners."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

import fedpet
from fedpet.config import ClientsConfig, DataConfig
from fedpet.config.parsing import read_stage
from fedpet.data import FederatedData, load_data
from fedpet.data.open_source import open_source
from fedpet.errors import ConfigError, DataError, InputError


@pytest.fixture(scope="module")
def rows(files: tuple[Path, Path]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (files[1] / "train.jsonl").read_text().splitlines()]


def loaded(data: fedpet.FederatedDataset, files: tuple[Path, Path], cache: Path) -> FederatedData:
    tables = data.tables(cache)
    return load_data(
        read_stage(DataConfig, "data", {"max-length": 16, **tables["data"]}),
        read_stage(ClientsConfig, "clients", {"min-rows": 1, **tables["clients"]}),
        files[0],
        cache=cache,
    )


def same(one: FederatedData, other: FederatedData) -> bool:
    return (
        np.array_equal(one.train.tokens, other.train.tokens)
        and np.array_equal(one.train.labels, other.train.labels)
        and np.array_equal(one.evaluation.tokens, other.evaluation.tokens)
        and one.task == other.task
        and [(c.id, c.rows.tolist()) for c in one.clients]
        == [(c.id, c.rows.tolist()) for c in other.clients]
    )


class Partitioner:
    """A stand-in with the interface of flwr-datasets' partitioners: row i to client i % 3."""

    def __init__(self, num_partitions: int = 3) -> None:
        self._dataset: Dataset | None = None
        self._num_partitions = num_partitions

    @property
    def dataset(self) -> Dataset:
        assert self._dataset is not None
        return self._dataset

    @dataset.setter
    def dataset(self, value: Dataset) -> None:
        if self._dataset is not None:
            raise ValueError("The dataset should be assigned only once.")
        self._dataset = value

    @property
    def num_partitions(self) -> int:
        return self._num_partitions

    def load_partition(self, partition_id: int) -> Dataset:
        return self.dataset.shard(self._num_partitions, partition_id, contiguous=False)


def test_rows_in_memory_are_the_rows_of_the_same_file(
    rows: list[dict[str, Any]], files: tuple[Path, Path], tmp_path: Path
) -> None:
    pandas = pytest.importorskip("pandas")
    by_file = fedpet.load_federated_dataset(
        files[1] / "train.jsonl", client_column="client", evaluation=0.25
    )
    wanted = loaded(by_file, files, tmp_path)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    table = Dataset.from_list(rows)
    for given in (
        table,
        DatasetDict({"train": table}),
        rows,
        pandas.DataFrame(rows),
        columns,
        table.shuffle(seed=1),
    ):
        data = fedpet.load_federated_dataset(given, client_column="client", evaluation=0.25)
        found = loaded(data, files, tmp_path)
        if given is table or not isinstance(given, Dataset):
            assert same(found, wanted)
        else:  # in another order: the same rows are held out
            assert sorted(found.evaluation.tokens) == sorted(wanted.evaluation.tokens)


def test_a_split_of_another_name_and_rows_of_their_own_are_evaluated_on(
    rows: list[dict[str, Any]], files: tuple[Path, Path], tmp_path: Path
) -> None:
    table, held = Dataset.from_list(rows[:60]), Dataset.from_list(rows[60:])
    wanted = loaded(
        fedpet.load_federated_dataset(DatasetDict(train=table, test=held), client_column="client"),
        files,
        tmp_path,
    )
    assert len(wanted.evaluation) == 12
    for given, evaluation in (
        (DatasetDict(train=table, validation=held), None),
        (DatasetDict(train=table, mine=held, other=held), "mine"),
        ({"train": table, "test": held}, None),
        (table, held),
        (rows[:60], rows[60:]),
    ):
        data = fedpet.load_federated_dataset(given, client_column="client", evaluation=evaluation)
        assert same(loaded(data, files, tmp_path), wanted)


def test_names_of_a_class_label_keep_their_order(
    rows: list[dict[str, Any]], files: tuple[Path, Path], tmp_path: Path
) -> None:
    features = Features(
        text=Value("string"), label=ClassLabel(names=["yes", "no"]), client=Value("string")
    )
    table = Dataset.from_list(rows, features=features)
    data = fedpet.load_federated_dataset(table, client_column="client")
    assert loaded(data, files, tmp_path).task.label_names == ("yes", "no")
    dealt = fedpet.load_federated_dataset(table, partitioner=Partitioner())
    assert loaded(dealt, files, tmp_path).task.label_names == ("yes", "no")


@pytest.mark.parametrize("given", ["memory", "file", "folder"])
def test_a_foreign_partitioner_deals_out_the_training_rows_wherever_they_come_from(
    given: str, rows: list[dict[str, Any]], files: tuple[Path, Path], tmp_path: Path
) -> None:
    source: Any = {
        "memory": Dataset.from_list(rows),
        "file": files[1] / "train.jsonl",
        "folder": files[1],
    }[given]
    evaluation = None if given == "folder" else 0.25
    whole = fedpet.load_federated_dataset(source, client_column="client", evaluation=evaluation)
    wanted = loaded(whole, files, tmp_path)
    data = fedpet.load_federated_dataset(source, partitioner=Partitioner(), evaluation=evaluation)
    found = loaded(data, files, tmp_path)
    assert np.array_equal(found.train.tokens, wanted.train.tokens)
    assert np.array_equal(found.evaluation.tokens, wanted.evaluation.tokens)
    assert [client.rows.tolist() for client in found.clients] == [
        list(range(number, len(found.train), 3)) for number in range(3)
    ]


def test_rows_that_a_partitioner_gives_to_nobody_are_left_out(
    rows: list[dict[str, Any]], files: tuple[Path, Path], tmp_path: Path
) -> None:
    class First(Partitioner):
        def load_partition(self, partition_id: int) -> Dataset:
            return super().load_partition(partition_id).select(range(5))

    data = fedpet.load_federated_dataset(rows, partitioner=First(), evaluation=rows[:8])
    assert [len(client.rows) for client in loaded(data, files, tmp_path).clients] == [5, 5, 5]


def test_a_run_over_a_foreign_partitioner_is_resumed_without_it(
    rows: list[dict[str, Any]], files: tuple[Path, Path], tmp_path: Path
) -> None:
    class Stop(fedpet.Callback):
        def on_round_end(self, record: Any, ledger: Any) -> None:
            raise ZeroDivisionError

    def start(out: Path, **more: Any) -> fedpet.Run:
        data = fedpet.load_federated_dataset(rows, partitioner=Partitioner(), max_length=16)
        return fedpet.simulate(
            files[0], data, out=out, num_rounds=1, backend="in-process", progress=False, **more
        )

    whole = start(tmp_path / "whole")
    assert whole.result["data"]["clients"] == 3
    with pytest.raises(ZeroDivisionError):
        start(tmp_path / "cut", callbacks=[Stop()])
    resumed = fedpet.resume(tmp_path / "cut", backend="in-process", progress=False)
    assert resumed.result["final_values_sha256"] == whole.result["final_values_sha256"]


def test_rules_by_name_are_those_of_the_experiment(rows: list[dict[str, Any]]) -> None:
    data = fedpet.load_federated_dataset(rows, partitioner="dirichlet")
    assert data.clients == {"partition": "dirichlet"}


def test_the_same_rows_get_the_same_place_and_other_rows_another(
    rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    def place(some: Any) -> str:
        data = fedpet.load_federated_dataset(some, client_column="client")
        return str(data.tables(tmp_path)["data"]["source"])

    table = Dataset.from_list(rows)
    assert place(rows) == place(table) == place(table.select(range(len(rows))))
    assert place(table.select(range(len(rows) - 1))) != place(table)
    assert open_source(place(rows)).read("train").num_rows == len(rows)


def test_arguments_that_cannot_be_used_are_refused_in_one_sentence(
    rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    def refused(given: Any, **arguments: Any) -> str:
        with pytest.raises((ConfigError, DataError)) as caught:
            fedpet.load_federated_dataset(given, **arguments)
        return str(caught.value)

    table = Dataset.from_list(rows)
    assert "rows must be" in refused(7)
    assert "no rows" in refused(table.select([]))
    assert "do not make a table" in refused([{"text": 1}, {"text": {"a": 1}}])
    assert "leave one out" in refused(rows, client_column="client", partitioner=Partitioner())
    assert "must be one of" in refused(rows, partitioner="pathological")
    assert "load_partition" in refused(rows, partitioner=object())
    assert "no split 'dev'" in refused(DatasetDict(train=table, test=table), evaluation="dev")
    assert "no split 'train'" in refused(DatasetDict(a=table, b=table))
    assert "Known are" in refused(rows, maxlength=8)
    assert "its argument `evaluation`" in refused(rows, eval_split="test")
    assert "name of a split" in refused("reviews.csv", evaluation=table)
    assert "no column 'sentence'" in refused(
        rows, text_columns="sentence", partitioner=Partitioner()
    )


def test_a_tokenizer_that_is_not_the_models_is_refused(
    rows: list[dict[str, Any]], files: tuple[Path, Path], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(tiny.make_backbone(tmp_path / "other"))
    other.add_tokens(["unheard-of"])
    data = fedpet.load_federated_dataset(rows, client_column="client", tokenizer=other)
    with pytest.raises(InputError, match="another vocabulary"):
        fedpet.simulate(files[0], data, backend="in-process", progress=False)
