"""Chunks cover a round's clients once, in order, and none is larger than it may be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpet.server.client_pool import ClientPool
from fedpet.server.schedule import LEAST, MOST, REPLY_BYTES, Schedule, chunk_size

rows_of = st.dictionaries(st.integers(0, 9999).map("{:04d}".format), st.integers(1, 400))


def drained(schedule: Schedule) -> list[tuple[int, list[str]]]:
    """The chunks when nodes take turns."""
    taken: list[tuple[int, list[str]]] = []
    while chunks := [(node, chunk) for node in schedule.nodes if (chunk := schedule.next(node))]:
        taken += chunks
    return taken


@given(rows=rows_of, nodes=st.integers(1, 5), most=st.integers(1, 9), home=st.booleans())
def test_every_client_is_in_one_chunk_and_no_chunk_is_too_large(
    rows: dict[str, int], nodes: int, most: int, home: bool
) -> None:
    homes = {name: int(name) % nodes for name in rows} if home else {}
    schedule = Schedule(sorted(rows), range(nodes), ClientPool(rows, homes), most)
    taken = drained(schedule)
    assert sorted(name for _, chunk in taken for name in chunk) == sorted(rows)
    assert all(len(chunk) <= most and chunk == sorted(chunk) for _, chunk in taken)
    if home:
        assert all(homes[name] == node for node, chunk in taken for name in chunk)


@given(rows=rows_of, nodes=st.integers(1, 5))
def test_a_round_of_a_chunk_a_node_is_spread_by_rows(rows: dict[str, int], nodes: int) -> None:
    population = ClientPool(rows, {})
    schedule = Schedule(sorted(rows), range(nodes), population, most=len(rows) + 1)
    assert dict(drained(schedule)) == population.cohorts(rows, range(nodes))


def test_a_long_round_goes_out_in_the_order_of_names_and_ends_in_small_chunks() -> None:
    rows = {f"{number:04d}": 1 + number % 7 for number in range(3000)}
    taken = drained(Schedule(sorted(rows), [1, 2, 3], ClientPool(rows, {}), MOST))
    assert [name for _, chunk in taken for name in chunk] == sorted(rows)
    sizes = [len(chunk) for _, chunk in taken]
    assert sizes[0] == MOST
    assert max(sizes[-3:]) <= LEAST + 1
    assert len(sizes) < 3000 / MOST + 24


def test_a_node_takes_the_next_chunk_when_it_is_free_and_a_slow_one_takes_fewer() -> None:
    rows = dict.fromkeys(map("{:04d}".format, range(1000)), 1)
    schedule = Schedule(sorted(rows), [1, 2], ClientPool(rows, {}), MOST)
    first = schedule.next(1)
    rest = []
    while chunk := schedule.next(2):
        rest += chunk
    assert first + rest == sorted(rows)
    assert not schedule.next(1)


@pytest.mark.parametrize("rows", [{"a": 1, "b": 1}, {"a": 9, "b": 1}])
def test_a_client_whose_turn_has_not_come_is_known(rows: dict[str, int]) -> None:
    schedule = Schedule(sorted(rows), [1], ClientPool(rows, {"a": 1, "b": 1}), 1)
    assert schedule.next(1) == ["a"]
    assert "a" not in schedule
    assert "b" in schedule


def test_a_chunk_s_replies_fit_its_bound_and_one_client_s_always_do() -> None:
    assert chunk_size(1) == MOST
    assert chunk_size(REPLY_BYTES) == chunk_size(100 * REPLY_BYTES) == 1
    assert chunk_size(360_000) * 360_000 <= REPLY_BYTES
