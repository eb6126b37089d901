"""Give tests of estimates the configuration of a backbone without its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny


@pytest.fixture
def config_only(files: tuple[Path, Path], tmp_path: Path) -> Path:
    return tiny.config_alone(files[0], tmp_path / "alone")
