"""Partition: every row has one owner, by a seed, and nobody is left out silently."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpet.config import ClientsConfig
from fedpet.data import partition_with
from fedpet.data.partition import drop_small_clients, group_rows, numbered, partition
from fedpet.errors import ConfigError, DataError

labels_lists = st.lists(st.integers(0, 4), min_size=1, max_size=150)
populations = st.builds(
    ClientsConfig,
    partition=st.sampled_from(["dirichlet", "shards", "iid"]),
    num_clients=st.integers(1, 12),
    dirichlet_alpha=st.sampled_from([1e-300, 1e-3, 0.3, 5.0, 1e6, 1e308]),
    shards_per_client=st.integers(1, 4),
    min_rows=st.integers(1, 10),
    seed=st.integers(0, 2**32),
)


@given(labels=labels_lists, population=populations)
def test_the_parts_are_a_disjoint_cover_of_the_rows(
    labels: list[int], population: ClientsConfig
) -> None:
    parts = partition(np.array(labels), population)
    assert len(parts) == population.num_clients
    owned = np.concatenate(list(parts.values()))
    assert sorted(owned.tolist()) == list(range(len(labels)))
    for rows in parts.values():
        assert rows.dtype == np.int64
        assert (np.diff(rows) > 0).all()


@given(labels=labels_lists, population=populations)
def test_the_same_seed_gives_the_same_parts(labels: list[int], population: ClientsConfig) -> None:
    first, second = (partition(np.array(labels), population) for _ in range(2))
    assert {k: v.tolist() for k, v in first.items()} == {k: v.tolist() for k, v in second.items()}


@pytest.mark.parametrize("rule", ["dirichlet", "shards", "iid"])
def test_another_seed_gives_other_parts(rule: str) -> None:
    labels = np.arange(200) % 4
    first, second = (
        partition(labels, ClientsConfig(partition=rule, num_clients=8, seed=seed))
        for seed in (0, 1)
    )
    assert any(first[name].tolist() != second[name].tolist() for name in first)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        # Computed once with numpy 2.4 on x86-64; a change here changes everybody's clients.
        ("iid", [[0, 4, 9, 10], [2, 3, 5, 8], [1, 6, 7, 11]]),
        ("shards", [[5, 8, 10, 11], [0, 1, 3, 6], [2, 4, 7, 9]]),
        ("dirichlet", [[4, 6, 10], [0, 8], [1, 2, 3, 5, 7, 9, 11]]),
    ],
)
def test_a_seed_means_the_same_clients_on_every_machine(
    rule: str, expected: list[list[int]]
) -> None:
    population = ClientsConfig(partition=rule, num_clients=3, seed=0)
    parts = partition(np.array([0, 1] * 6), population)
    assert [parts[name].tolist() for name in ("0", "1", "2")] == expected


@given(labels=labels_lists, population=populations)
def test_what_takes_part_and_what_is_left_out_add_up_to_all(
    labels: list[int], population: ClientsConfig
) -> None:
    parts = partition(np.array(labels), population)
    if max(map(len, parts.values())) < population.min_rows:
        with pytest.raises(DataError, match=r"^none of \d+ clients has clients\.min-rows"):
            drop_small_clients(parts, len(labels), population)
        return
    kept = drop_small_clients(parts, len(labels), population)
    assert len(kept.clients) + kept.left_out_clients == population.num_clients
    assert sum(len(c.rows) for c in kept.clients) + kept.left_out_rows == len(labels)
    assert all(len(client.rows) >= population.min_rows for client in kept.clients)
    assert [c.id for c in kept.clients] == sorted(c.id for c in kept.clients)


def test_a_client_with_no_row_is_counted_as_left_out_and_never_appears() -> None:
    population = ClientsConfig(partition="iid", num_clients=5, min_rows=1)
    kept = drop_small_clients(partition(np.zeros(3, np.int64), population), 3, population)
    assert len(kept.clients) == 3
    assert (kept.left_out_clients, kept.left_out_rows) == (2, 0)


def test_when_no_client_is_left_the_message_says_how_large_the_largest_is() -> None:
    population = ClientsConfig(partition="iid", num_clients=4, min_rows=8)
    parts = partition(np.zeros(10, np.int64), population)
    with pytest.raises(
        DataError,
        match=r"^none of 4 clients has clients\.min-rows = 8 rows; the largest has 3\. "
        r"Ask for fewer rows a client, add rows, or share the 10 rows among fewer clients\.$",
    ):
        drop_small_clients(parts, 10, population)


def test_a_tiny_alpha_gives_each_class_to_one_client() -> None:
    labels = np.arange(400) % 4
    population = ClientsConfig(partition="dirichlet", num_clients=10, dirichlet_alpha=1e-6)
    parts = partition(labels, population)
    holders = [{n for n, rows in parts.items() if label in labels[rows]} for label in range(4)]
    assert all(len(names) == 1 for names in holders)


@pytest.mark.parametrize("alpha", [1e7, 1e308])
def test_a_huge_alpha_gives_every_client_its_share_of_every_class(alpha: float) -> None:
    labels = np.arange(400) % 4
    population = ClientsConfig(partition="dirichlet", num_clients=10, dirichlet_alpha=alpha)
    for rows in partition(labels, population).values():
        assert np.abs(np.bincount(labels[rows], minlength=4) - 10).max() <= 1


def test_a_client_sees_no_more_labels_than_its_shards_can_hold() -> None:
    labels = np.random.default_rng(0).permutation(np.arange(400) % 4)
    population = ClientsConfig(partition="shards", num_clients=10, shards_per_client=2)
    parts = partition(labels, population)
    # 20 shards of 20 rows; each class fills exactly five
    assert all(len(rows) == 40 for rows in parts.values())
    assert all(len(np.unique(labels[rows])) <= 2 for rows in parts.values())


def test_shards_sort_a_regression_by_its_value() -> None:
    labels = np.random.default_rng(0).normal(size=100).astype(np.float32)
    population = ClientsConfig(partition="shards", num_clients=4, shards_per_client=1)
    ranges = sorted(
        (float(labels[rows].min()), float(labels[rows].max()))
        for rows in partition(labels, population).values()
    )
    assert all(a[1] < b[0] for a, b in pairwise(ranges))


def test_dirichlet_over_a_regression_is_refused_with_what_works_instead() -> None:
    with pytest.raises(ConfigError, match="a regression has none: take 'column', 'shards'"):
        partition(np.zeros(9, np.float32), ClientsConfig(partition="dirichlet"))


@given(n=st.integers(1, 100), num_clients=st.integers(1, 12))
def test_iid_parts_differ_in_size_by_one_at_most(n: int, num_clients: int) -> None:
    parts = partition(
        np.zeros(n, np.int64), ClientsConfig(partition="iid", num_clients=num_clients)
    )
    sizes = [len(rows) for rows in parts.values()]
    assert max(sizes) - min(sizes) <= 1


def test_a_natural_client_owns_exactly_the_rows_that_name_it() -> None:
    parts = group_rows(np.array([2, 0, 2, 2], np.int32), ("ann", "bob", "cy"))
    assert {name: rows.tolist() for name, rows in parts.items()} == {
        "ann": [1],
        "bob": [],
        "cy": [0, 2, 3],
    }


@given(num_clients=st.integers(1, 1200))
def test_numbered_ids_sort_in_the_order_of_their_numbers(num_clients: int) -> None:
    ids = numbered(num_clients)
    assert list(ids) == sorted(ids)
    assert [int(one) for one in ids] == list(range(num_clients))


class Rows:
    """As much of a `datasets.Dataset` as partitioning needs."""

    def __init__(self, columns: dict[str, list[Any]]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, name: str) -> list[Any]:
        return self.columns[name]

    def add_column(self, name: str, values: list[Any]) -> Rows:
        return Rows({**self.columns, name: values})

    def select(self, rows: list[int]) -> Rows:
        return Rows({n: [values[i] for i in rows] for n, values in self.columns.items()})


class StandIn:
    """flwr-datasets' partitioner interface: a dataset is assigned, partitions are loaded."""

    def __init__(self, parts: list[list[int]]) -> None:
        self.parts = parts
        self.dataset: Any = None

    @property
    def num_partitions(self) -> int:
        assert self.dataset is not None, "flwr-datasets may need the rows to count partitions"
        return len(self.parts)

    def load_partition(self, partition_id: int) -> Any:
        return self.dataset.select(self.parts[partition_id])


def test_a_partitioner_from_outside_decides_which_rows_a_client_owns() -> None:
    parts = partition_with(StandIn([[4, 0], [], [1, 2]]), Rows({"text": list("abcde")}))
    assert {name: rows.tolist() for name, rows in parts.items()} == {
        "0": [0, 4],
        "1": [],
        "2": [1, 2],
    }
    kept = drop_small_clients(parts, 5, ClientsConfig(min_rows=1))
    assert [client.id for client in kept.clients] == ["0", "2"]
    assert (kept.left_out_clients, kept.left_out_rows) == (1, 1)  # nobody was given row 3


def test_a_partitioner_that_gives_a_row_away_twice_is_refused() -> None:
    with pytest.raises(DataError, match="StandIn gives row 2 to more than one client"):
        partition_with(StandIn([[0, 1], [1, 2]]), Rows({"text": list("abc")}))
