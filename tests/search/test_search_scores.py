"""A search's checkpoint: a validation score that is no number loses to any that is."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from fedpet.backbone.pretrained import load_backbone
from fedpet.config import BackboneConfig, SearchConfig
from fedpet.data import FederatedData
from fedpet.errors import RunError
from fedpet.search import SearchResult, central, run_search

CONFIG = SearchConfig(
    budget=700,
    max_steps=3,
    batch_size=8,
    learning_rate=0.01,
    evaluate_every=1,
    validation_fraction=0.2,
)


def run(folder: Path, data: FederatedData) -> SearchResult:
    backbone = load_backbone(BackboneConfig(model=str(folder)), num_outputs=2)
    return run_search(backbone, data.train, np.arange(len(data.train)), data.task, CONFIG)


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([math.nan, 0.4, 0.3], 2),
        ([math.nan, math.nan, 0.1], 3),
        ([0.4, math.nan, 0.3], 1),
        ([0.3, math.nan, 0.3], 3),  # of equals the later one
    ],
)
def test_the_checkpoint_is_the_best_of_the_scores_that_are_numbers(
    folder: Path,
    data: FederatedData,
    monkeypatch: pytest.MonkeyPatch,
    scores: list[float],
    best: int,
) -> None:
    given = iter(scores)
    monkeypatch.setattr(central, "_score", lambda *_: next(given))
    found = run(folder, data)
    assert (found.step, found.score) == (best, scores[best - 1])


def test_a_search_without_one_score_that_is_a_number_fails_and_says_what_to_lower(
    folder: Path, data: FederatedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(central, "_score", lambda *_: math.nan)
    with pytest.raises(RunError, match=r"validation rows is NaN.*Lower search\.learning-rate"):
        run(folder, data)
