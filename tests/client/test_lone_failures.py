"""One client whose training fails is refused by itself, and its node's others are averaged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from in_process_run import run
from search_runs import SEARCH

from fedpet.client import train_client as client_module
from fedpet.config import Experiment
from fedpet.errors import TrainingError
from fedpet.search import SearchModel

SECRET = "the row says: good film"
FAILURES: dict[str, tuple[type[Exception], str]] = {
    "shapes": (RuntimeError, "training failed with RuntimeError"),
    "positions": (IndexError, "training failed with IndexError"),
    "gpu memory": (torch.OutOfMemoryError, "memory ran out"),
    "memory": (MemoryError, "memory ran out"),
}


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[Exception]], None]:
    """Makes the second client that trains fail after its first step, in the middle of things."""
    train = client_module.train_rows

    def make(kind: type[Exception]) -> None:
        asked = [0]

        def train_rows(*args: Any, after_step: Callable[[], None], **named: Any) -> Any:
            asked[0] += 1
            number = asked[0]

            def stop() -> None:
                if number == 2:
                    raise kind(SECRET)
                after_step()

            return train(*args, after_step=stop, **named)

        monkeypatch.setattr(client_module, "train_rows", train_rows)

    return make


@pytest.mark.parametrize("failure", FAILURES)
def test_a_client_whose_training_fails_is_refused_alone_and_its_reason_quotes_no_row(
    failure: str, experiment: Callable[..., Experiment], failing: Callable[[type[Exception]], None]
) -> None:
    kind, words = FAILURES[failure]
    failing(kind)
    result = run(experiment(strategy_num_rounds=1))
    [refused] = result["refused"]
    assert words in refused["reason"]
    assert SECRET not in refused["reason"]
    failing(TrainingError)  # refused since ever: the rest of the cohort is what it is then
    expected = run(experiment(strategy_num_rounds=1))
    assert [other["who"] for other in expected["refused"]] == [refused["who"]]
    assert result["final_values_sha256"] == expected["final_values_sha256"]


def test_a_client_whose_search_fails_is_refused_alone(
    experiment: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    search, asked = SearchModel.search_rows, [0]

    def search_rows(*args: Any, **named: Any) -> Any:
        asked[0] += 1
        if asked[0] == 2:
            raise RuntimeError(SECRET)
        return search(*args, **named)

    monkeypatch.setattr(SearchModel, "search_rows", search_rows)
    changes = {**SEARCH, "search_rounds": 1, "search_local_steps": 1}
    [refused] = run(experiment(**changes, strategy_quorum=0.5))["refused"]
    assert refused["kind"] == "search"
    assert SECRET not in refused["reason"]
