"""Give tests of reports a folder of runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_runs import make_runs


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return make_runs(tmp_path)
