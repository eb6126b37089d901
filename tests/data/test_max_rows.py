"""A client's rows are capped by a draw of its own, and every row left out is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_fixtures import write

from fedpet.config import ClientsConfig, DataConfig
from fedpet.data import count_clients, load_data
from fedpet.data.partition import cap_rows, numbered
from fedpet.errors import ConfigError

sizes_lists = st.lists(st.integers(0, 40), min_size=1, max_size=8)


def parts_of(sizes: list[int]) -> dict[str, np.ndarray]:
    ends = np.cumsum(sizes)
    names = numbered(len(sizes))
    return {
        name: np.arange(end - size, end) for name, size, end in zip(names, sizes, ends, strict=True)
    }


@given(sizes=sizes_lists, most=st.integers(1, 50), seed=st.integers(0, 2**32))
def test_a_client_has_its_own_rows_in_their_order_and_no_more_than_it_may(
    sizes: list[int], most: int, seed: int
) -> None:
    parts = parts_of(sizes)
    capped = cap_rows(parts, ClientsConfig(min_rows=1, max_rows=most, seed=seed))
    assert list(capped) == list(parts)
    for name, rows in capped.items():
        assert len(rows) == min(most, len(parts[name]))
        assert set(rows) <= set(parts[name])
        assert (np.diff(rows) > 0).all()


@given(sizes=sizes_lists, seed=st.integers(0, 2**32))
def test_the_draw_of_a_client_does_not_depend_on_the_others(sizes: list[int], seed: int) -> None:
    parts = parts_of(sizes)
    population = ClientsConfig(min_rows=1, max_rows=3, seed=seed)
    together = cap_rows(parts, population)
    for name, rows in parts.items():
        assert (cap_rows({name: rows}, population)[name] == together[name]).all()


def test_another_seed_draws_other_rows_and_no_limit_draws_none() -> None:
    parts = parts_of([40])
    draws = {
        tuple(cap_rows(parts, ClientsConfig(min_rows=1, max_rows=8, seed=seed))["0"])
        for seed in range(8)
    }
    assert len(draws) == 8
    assert cap_rows(parts, ClientsConfig())["0"] is parts["0"]


def test_a_limit_below_the_least_is_refused_since_nobody_would_take_part() -> None:
    with pytest.raises(ConfigError, match=r"max-rows is 4, and clients.min-rows 8"):
        ClientsConfig(max_rows=4)


@pytest.mark.parametrize(
    "population",
    [
        {"partition": "column"},
        {"partition": "iid", "num_clients": 2},
        {"partition": "shards", "num_clients": 2},
        {"partition": "dirichlet", "num_clients": 2, "dirichlet_alpha": 100.0},
    ],
    ids=lambda given: given["partition"],
)
def test_rows_beyond_the_limit_are_counted_and_estimates_see_the_same_clients(
    population: dict[str, Any], tokenizer_folder: Path, tmp_path: Path
) -> None:
    rows = [
        {"text": f"good film {i}", "label": i % 2, "client": "large" if i % 10 else "small"}
        for i in range(40)
    ]
    write(tmp_path / "set" / "train.jsonl", rows)
    write(tmp_path / "set" / "test.jsonl", rows[:4])
    data = DataConfig(source=str(tmp_path / "set"))
    clients = ClientsConfig(min_rows=2, max_rows=6, **population)
    found = load_data(data, clients, tokenizer_folder, cache=tmp_path / "cache")
    held = {client.id: len(client.rows) for client in found.clients}
    assert max(held.values()) == 6
    books = found.books["train"]
    assert books.used == sum(held.values())
    assert books.read == books.used + sum(books.left_out.values())
    assert books.left_out["beyond clients.max-rows"] == 40 - sum(held.values())
    counted = count_clients(data, clients, cache=tmp_path / "cache")
    assert dict(counted.num_rows) == held
