"""Test sampling: by the client's name, never by the node."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedpet.server.client_pool import ClientPool, ConnectedClientPool
from fedpet.utils.seeds import client_id64, derive_seed

clients = st.dictionaries(st.text(min_size=1, max_size=8), st.integers(1, 50), min_size=1)
nodes = st.sets(st.integers(1, 2**63), min_size=1, max_size=6)


@given(clients, st.integers(1, 30), st.integers(0, 9), st.integers(1, 99))
def test_a_round_s_clients_are_drawn_without_repeats_and_by_the_seed_alone(
    rows: dict[str, int], number: int, seed: int, server_round: int
) -> None:
    population = ClientPool(rows, {})
    shuffled = ClientPool(dict(reversed(rows.items())), {})
    drawn = population.sample(server_round, number, seed)
    assert drawn == shuffled.sample(server_round, number, seed)
    assert len(set(drawn)) == len(drawn) == min(number, len(rows))
    assert set(drawn) <= set(rows)


@given(clients, nodes)
def test_every_client_is_trained_on_exactly_one_node(rows: dict[str, int], nodes: set[int]) -> None:
    cohorts = ClientPool(rows, {}).cohorts(rows, nodes)
    assert sorted(name for cohort in cohorts.values() for name in cohort) == sorted(rows)
    assert all(cohort for cohort in cohorts.values())
    assert set(cohorts) <= nodes


@given(clients, nodes)
def test_no_node_carries_more_than_the_largest_client_above_the_mean(
    rows: dict[str, int], nodes: set[int]
) -> None:
    cohorts = ClientPool(rows, {}).cohorts(rows, nodes)
    loads = [sum(rows[name] for name in cohort) for cohort in cohorts.values()]
    assert max(loads) <= sum(rows.values()) / len(nodes) + max(rows.values())


def test_a_client_with_a_home_is_trained_there_or_not_at_all() -> None:
    population = ClientPool({"a": 3, "b": 9, "c": 1}, {"a": 1, "b": 2, "c": 1})
    assert population.cohorts(["a", "b", "c"], [1, 2]) == {1: ["a", "c"], 2: ["b"]}
    assert population.cohorts(["a", "b", "c"], [2, 3]) == {2: ["b"]}


def test_seeds_and_numbers_are_the_same_on_every_machine() -> None:
    # SHA-256 of the parts; fixed here so that a change of it is seen.
    assert derive_seed(0, "sample", 1) == 5284687766452722292
    assert client_id64("client 1") == 6054038747608711647
    assert derive_seed(0, "a") != derive_seed("0", "a")


# -- clients that come with their nodes --------------------------------------------------------


def test_residents_are_drawn_as_a_simulation_draws_them_whatever_nodes_they_live_on() -> None:
    rows = {f"client {n}": n + 1 for n in range(9)}
    residents = ConnectedClientPool()
    names = list(reversed(rows))
    for node in range(4):
        assert residents.register(100 + node, {name: rows[name] for name in names[node::4]}) == {}
    for server_round in range(1, 20):
        drawn = residents.sample(server_round, 4, seed=3)
        assert drawn == ClientPool(rows, {}).sample(server_round, 4, seed=3)
        cohorts = residents.cohorts(drawn, residents.online_nodes)
        assert sorted(name for names in cohorts.values() for name in names) == drawn


def test_a_client_moves_only_when_its_node_has_left() -> None:
    residents = ConnectedClientPool()
    residents.register(1, {"a": 5})
    assert "lives on node 1" in residents.register(2, {"a": 5})["a"]
    residents.unregister(1)
    assert residents.present == {}
    assert residents.register(2, {"a": 7}) == {}
    assert (residents.homes, residents.present) == ({"a": 2}, {"a": 7})


def test_a_node_that_comes_back_has_the_clients_that_it_brings_then() -> None:
    residents = ConnectedClientPool()
    residents.register(1, {"a": 5, "b": 6})
    residents.unregister(1)
    assert residents.register(1, {"a": 5}) == {}
    assert residents.present == {"a": 5}
    assert residents.register(2, {"b": 6}) == {}
