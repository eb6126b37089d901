"""Give tests of the search a tiny backbone and its rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import make_backbone, make_rows

from fedpet.config import ClientsConfig, DataConfig
from fedpet.data import FederatedData, load_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def data(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> FederatedData:
    rows = make_rows(tmp_path_factory.mktemp("rows"))
    population = ClientsConfig(client_column="client", min_rows=2)
    source = DataConfig(source=str(rows), max_length=16)
    return load_data(source, population, folder, cache=rows / "cache")
