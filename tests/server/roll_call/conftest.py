"""Share an experiment whose clients live on the nodes among the tests of registration."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from roll_call_runs import on_nodes

from fedpet.config import Experiment


@pytest.fixture
def deployed(experiment: Callable[..., Experiment]) -> Callable[..., Experiment]:
    return partial(on_nodes, experiment)
