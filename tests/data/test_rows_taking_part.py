"""With a limit of rows a client, rows that take no part are not tokenised, and no row changes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from language_models import make_rows
from language_models import save_tokenizer as save_chat_tokenizer
from text_fixtures import some_rows, write

from fedpet.config import ClientsConfig, DataConfig
from fedpet.data import FederatedData, count_clients, load_data
from fedpet.data.partition import cap_rows
from fedpet.errors import DataError

RULES: list[dict[str, Any]] = [
    {"partition": "column", "client_column": "owner"},
    {"partition": "iid", "num_clients": 4},
    {"partition": "shards", "num_clients": 4},
    {"partition": "dirichlet", "num_clients": 6, "dirichlet_alpha": 0.3},
]


class ByOwner:
    """A partitioner as flwr-datasets has them, which leaves two owners out."""

    dataset: Any = None
    num_partitions = 3

    def load_partition(self, partition_id: int) -> Any:
        owners = np.array(self.dataset["owner"][:])
        return self.dataset.select(np.flatnonzero(owners == f"owner {partition_id}"))


@pytest.fixture
def source(tmp_path: Path) -> DataConfig:
    rows = some_rows(90)
    for index, row in enumerate(rows):
        row["owner"] = f"owner {min(index % 11, 4)}"  # the last has most of the rows
    write(tmp_path / "set" / "train.jsonl", rows)
    write(tmp_path / "set" / "test.jsonl", rows[:5])
    return DataConfig(source=str(tmp_path / "set"), max_train_rows=80)


def tokens_of(data: FederatedData, rows: np.ndarray) -> list[tuple[list[int], Any]]:
    spans = zip(data.train.offsets[rows], data.train.offsets[rows + 1], strict=True)
    texts = [data.train.tokens[start:stop].tolist() for start, stop in spans]
    return list(zip(texts, data.train.labels[rows].tolist(), strict=True))


@pytest.mark.parametrize("rule", [*RULES, {}], ids=lambda rule: rule.get("partition", "object"))
def test_clients_have_the_rows_that_they_have_where_all_are_tokenised(
    rule: dict[str, Any], source: DataConfig, tokenizer_folder: Path, tmp_path: Path
) -> None:
    population = ClientsConfig(**({"partition": "iid"} | rule), min_rows=1)
    partitioner = None if rule else ByOwner()

    def load(population: ClientsConfig) -> FederatedData:
        return load_data(
            source,
            population,
            tokenizer_folder,
            cache=tmp_path / "cache",
            partitioner=partitioner,
        )

    full = load(population)
    limited = replace(population, min_rows=5, max_rows=9)
    found = load(limited)
    wanted = cap_rows({client.id: client.rows for client in full.clients}, limited)
    wanted = {name: rows for name, rows in wanted.items() if len(rows) >= 5}
    assert [client.id for client in found.clients] == list(wanted)
    for client in found.clients:
        assert tokens_of(found, client.rows) == tokens_of(full, wanted[client.id])
    taking_part = sum(map(len, wanted.values()))
    assert len(found.train) == taking_part < len(full.train) == 80
    books = found.books["train"]
    assert (books.read, books.used) == (90, taking_part)
    assert books.read == books.used + sum(books.left_out.values())
    assert books.left_out["beyond data.max-train-rows"] == 10
    assert found.left_out_rows == 80 - taking_part


def test_only_rows_that_take_part_reach_the_tokeniser_and_a_second_start_reads_none(
    source: DataConfig,
    tokenizer_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limited = ClientsConfig(client_column="owner", min_rows=8, max_rows=8)
    reported: list[int] = []

    def load() -> FederatedData:
        return load_data(
            source,
            limited,
            tokenizer_folder,
            cache=tmp_path / "cache",
            evaluation=False,
            on_rows=lambda done, total: reported.append(total),
        )

    first = load()
    assert set(reported) == {sum(len(client.rows) for client in first.clients)} == {32}
    monkeypatch.setattr("fedpet.data.tokenize.tokenize_rows", None)
    monkeypatch.setattr("fedpet.data.local_files.Files.read", None)
    second = load()
    assert second.train.tokens.tolist() == first.train.tokens.tolist()


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"max_rows": 7}, {"min_rows": 8}, {"partition": "iid"}, {"max_rows": 0}]
)
def test_rows_of_another_choice_are_never_answered_from_those_of_the_old_one(
    change: dict[str, Any], source: DataConfig, tokenizer_folder: Path, tmp_path: Path
) -> None:
    limited = ClientsConfig(client_column="owner", min_rows=2, max_rows=8)
    other = replace(limited, **change)
    load_data(source, limited, tokenizer_folder, cache=tmp_path / "cache")
    after = load_data(source, other, tokenizer_folder, cache=tmp_path / "cache")
    fresh = load_data(source, other, tokenizer_folder, cache=tmp_path / "other cache")
    assert [client.id for client in after.clients] == [client.id for client in fresh.clients]
    for one, same in zip(after.clients, fresh.clients, strict=True):
        assert tokens_of(after, one.rows) == tokens_of(fresh, same.rows)


def test_rows_that_clients_hold_out_take_part_and_an_estimate_counts_the_same(
    source: DataConfig, tokenizer_folder: Path, tmp_path: Path
) -> None:
    source = replace(source, eval_on="clients")
    held_out = ClientsConfig(client_column="owner", min_rows=4, max_rows=8, eval_fraction=0.3)
    found, whole = (
        load_data(source, population, tokenizer_folder, cache=tmp_path / "cache")
        for population in (held_out, replace(held_out, eval_fraction=0.0))
    )
    assert len(found.train) == len(whole.train) == sum(one.num_rows for one in found.clients)
    for one, other in zip(found.clients, whole.clients, strict=True):
        both = np.sort(np.concatenate([one.rows, one.held_out]))
        assert tokens_of(found, both) == tokens_of(whole, other.rows)
        assert set(one.rows).isdisjoint(one.held_out)
    counted = count_clients(source, held_out, cache=tmp_path / "cache")
    assert dict(counted.num_rows) == {one.id: len(one.rows) for one in found.clients}
    assert dict(counted.num_held_out) == {one.id: len(one.held_out) for one in found.clients}
    assert sum(counted.num_held_out.values()) > 0


@pytest.mark.parametrize("task", ["instruction", "language-modelling"])
def test_examples_of_language_models_are_those_of_a_file_with_the_drawn_rows_alone(
    task: str, tmp_path: Path
) -> None:
    save_chat_tokenizer(tmp_path / "tokenizer")
    make_rows(tmp_path / "all")
    lines = [
        json.loads(line) for line in (tmp_path / "all" / "train.jsonl").read_text().split("\n")[:-1]
    ]
    rows = {f"client {i}": np.arange(i, len(lines), 4) for i in range(4)}
    limited = ClientsConfig(client_column="client", min_rows=1, max_rows=3)
    drawn = np.sort(np.concatenate([*cap_rows(rows, limited).values()]))
    write(tmp_path / "drawn" / "train.jsonl", [lines[number] for number in drawn])
    data = DataConfig(
        source=str(tmp_path / "all"),
        task=task,
        metric="perplexity",
        max_length=48,
        messages_column="messages" if task == "instruction" else "",
    )
    found, wanted = (
        load_data(
            replace(data, source=str(tmp_path / folder)),
            population,
            tmp_path / "tokenizer",
            cache=tmp_path / "cache",
            evaluation=False,
        )
        for folder, population in (("all", limited), ("drawn", replace(limited, max_rows=0)))
    )
    assert [one.id for one in found.clients] == [one.id for one in wanted.clients]
    for one, other in zip(found.clients, wanted.clients, strict=True):
        assert tokens_of(found, one.rows) == tokens_of(wanted, other.rows)


def test_where_no_client_has_enough_rows_it_is_said_before_any_is_tokenised(
    source: DataConfig, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedpet.data.tokenize.tokenize_rows", None)  # a call would fail otherwise
    nobody = ClientsConfig(client_column="owner", min_rows=80, max_rows=80)
    with pytest.raises(DataError, match=r"none of 5 clients has clients\.min-rows = 80 rows"):
        load_data(source, nobody, tokenizer_folder, cache=tmp_path / "cache")


def test_a_row_that_takes_no_part_is_still_read_and_checked(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    rows = [*some_rows(20), {**some_rows(1)[0], "text": " ", "owner": "alone"}]
    write(tmp_path / "set" / "train.jsonl", rows)
    limited = ClientsConfig(client_column="owner", min_rows=2, max_rows=2)
    data = DataConfig(source=str(tmp_path / "set"))
    with pytest.raises(DataError, match=r"row 21 .* has an empty text"):
        load_data(data, limited, tokenizer_folder, cache=tmp_path / "cache", evaluation=False)
