"""The split of a search's rows: at random, or by whole clients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Silent, make_backbone, make_experiment, make_rows

from fedpet.errors import ConfigError, DataError
from fedpet.run.central_search import search_centrally
from fedpet.search import SearchConfig, split_rows

CLIENTS = SearchConfig(split="clients", validation_fraction=0.2)


@given(
    sizes=st.lists(st.integers(1, 30), min_size=3, max_size=25),
    seed=st.integers(0, 2**32),
    fraction=st.floats(0.05, 0.5),
)
@settings(max_examples=60, deadline=None)
def test_no_client_has_rows_in_two_parts_and_the_halves_are_alike_in_size(
    sizes: list[int], seed: int, fraction: float
) -> None:
    owners = np.repeat(np.arange(len(sizes)), sizes)
    indices = np.random.default_rng(seed).permutation(len(owners)) + 100
    config = SearchConfig(split="clients", validation_fraction=fraction, seed=seed)
    split = split_rows(indices, config, owners)
    of = dict(zip(indices.tolist(), owners.tolist(), strict=True))
    parts = [set(map(of.get, part.tolist())) for part in vars(split).values()]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    assert len(split.theta) == len(split.alpha) > 0
    assert len(split.validation) > 0
    together = np.concatenate([*vars(split).values()])
    assert len(set(together.tolist())) == len(together)


def test_the_same_seed_splits_alike_and_another_one_does_not() -> None:
    owners = np.repeat(np.arange(12), 5)
    one, again = (split_rows(np.arange(60), CLIENTS, owners) for _ in range(2))
    other = split_rows(np.arange(60), SearchConfig(split="clients", seed=1), owners)
    assert one.validation.tolist() == again.validation.tolist()
    assert one.validation.tolist() != other.validation.tolist()


def test_whole_clients_without_clients_are_refused_with_what_to_set() -> None:
    with pytest.raises(ConfigError, match=r'Set it to "rows"'):
        split_rows(np.arange(60), CLIENTS)
    with pytest.raises(DataError, match="clients in three, and got 2"):
        split_rows(np.arange(4), CLIENTS, np.array([0, 0, 1, 1]))


def test_a_search_of_an_experiment_s_clients_validates_on_held_out_ones(tmp_path: Path) -> None:
    experiment = make_experiment(
        make_backbone(tmp_path / "model"),
        make_rows(tmp_path / "rows"),
        tmp_path / "run",
        search_budget=600,
        search_max_steps=2,
        search_batch_size=4,
        search_split="clients",
        search_validation_fraction=0.3,
    )
    found = search_centrally(experiment, tmp_path / "structure.json", Silent())
    rows = found.provenance["rows"]
    assert rows["validation"] % 12 == 0  # of a client there are twelve
    assert rows["theta"] == rows["alpha"]
    assert rows["validation"] >= 0.3 * 72
