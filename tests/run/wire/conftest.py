"""Share training by a formula, and a way to run, among whole runs over the wire."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from modelless import train_by_formula
from wire_runs import runs_in


@pytest.fixture(autouse=True)
def training_by_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    train_by_formula(monkeypatch)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[np.ndarray, Any, list[int]]]:
    return runs_in(tmp_path)
