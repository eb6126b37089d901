"""Share settings, and a run before it, among the tests of a search by many clients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from search_runs import SEARCH, ready_to_search

from fedpet.config import Experiment
from fedpet.run.federate import PreparedSearch


@pytest.fixture
def experiment(experiment: Callable[..., Experiment]) -> Callable[..., Experiment]:
    return partial(experiment, **SEARCH)


@pytest.fixture(scope="module")
def searching(files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> PreparedSearch:
    return ready_to_search(files, tmp_path_factory.mktemp("searching") / "run")
