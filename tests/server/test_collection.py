"""The rounds never make Python's collector go through the backbone, whatever Flower asks of it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from search_runs import SEARCH
from tiny import Silent

from fedpet.client.node_config import NodeConfig
from fedpet.config import Experiment
from fedpet.run.federate import federate, prepare
from fedpet.run.local_grid import LocalGrid
from fedpet.run.run_folder import new_run_folder
from fedpet.utils.gc_paused import kept_from_collection


@pytest.fixture
def nothing_frozen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that has run nothing: the tests' own freeze is taken back for a while.

    Nodes are in this process, and freeze by themselves: theirs is left out.
    """
    nodes = SimpleNamespace(freeze=lambda: None, unfreeze=lambda: None)
    monkeypatch.setattr("fedpet.client.model_cache.gc", nodes)
    monkeypatch.setattr("fedpet.utils.gc_paused._inside", 0)
    gc.unfreeze()
    yield
    gc.freeze()


class Watch(Silent):
    """Counts the objects that a collection would go through when a round is over."""

    def __init__(self) -> None:
        self.to_look_at: list[int] = []

    def on_round_end(self, record: object, ledger: object) -> None:
        self.to_look_at.append(len(gc.get_objects()))


STRATEGY_PARAMETERS: dict[
    str, dict[str, Any]
] = {  # Flower collects for each reply of the first two
    "qfedavg": {"strategy_name": "qfedavg"},
    "bulyan": {"strategy_name": "bulyan", "strategy_num_malicious": 0},
    "fedavg": {},
    "a search": SEARCH,
}


@pytest.mark.parametrize("rule", STRATEGY_PARAMETERS)
def test_a_collection_in_the_rounds_leaves_out_what_was_loaded_before(
    rule: str, experiment: Callable[..., Experiment], nothing_frozen: None
) -> None:
    changes = {"strategy_num_rounds": 1, **STRATEGY_PARAMETERS[rule]}
    settled, watch = experiment(**changes), Watch()
    prepared, out = prepare(settled, Silent()), new_run_folder(settled)
    loaded = len(gc.get_objects())
    federate(LocalGrid.of(NodeConfig.from_experiment(settled), 1), prepared, out, watch)
    assert max(watch.to_look_at) < loaded / 4
    assert not gc.get_freeze_count()


def test_what_was_frozen_before_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedpet.utils.gc_paused._inside", 0)
    gc.freeze()
    before = gc.get_freeze_count()
    with kept_from_collection():
        pass
    assert gc.get_freeze_count() >= before > 0
