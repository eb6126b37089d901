"""Share a tiny backbone, an experiment and a finished search among tests of `fedpet search`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from search_files import Search, make_files, search_by_command, search_once, write_experiment


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_files(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def experiment(files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_experiment(*files, tmp_path_factory.mktemp("experiment"))


@pytest.fixture(scope="session")
def found(experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return search_once(experiment, tmp_path_factory.mktemp("found") / "structure.json")


@pytest.fixture
def search(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> Search:
    return partial(search_by_command, monkeypatch, experiment)
