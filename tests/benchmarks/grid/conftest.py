"""Share tiny data, and a table file over them, among the tests of the table of methods."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tomli_w


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    rows = tiny.make_rows(folder / "rows")
    shutil.copy(rows / "test.jsonl", rows / "validation.jsonl")
    return tiny.make_backbone(folder / "backbone"), rows


@pytest.fixture
def table_file(experiment: Any, tmp_path: Path) -> Callable[..., Path]:
    tables = experiment().to_tables()
    tables["run"]["out"] = ""
    (tmp_path / "tiny.toml").write_text(tomli_w.dumps(tables), encoding="utf-8")

    def write(**changes: Any) -> Path:
        content = {
            "experiment": "tiny.toml",
            "tune": {"split": "validation", "seed": 3},
            "final": {"split": "test", "seeds": [0, 1]},
            "methods": {
                "full": {"learning-rates": [0.001, 0.01]},
                "narrow": {"runs": "fedpet", "learning-rates": [0.01, 0.1], "set": []},
            },
            **changes,
        }
        path = tmp_path / "small.toml"
        path.write_text(tomli_w.dumps(content), encoding="utf-8")
        return path

    return write
