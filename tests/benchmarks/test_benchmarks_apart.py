"""Benchmarks stand beside the package, and every cell that was committed still reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import benchmarks
from benchmarks.central_grid import CentralCell
from benchmarks.stored_settings import stored_experiment
from benchmarks.suite_file import read_suite
from benchmarks.tables import read_grid
from fedpet.errors import ConfigError

FOLDER = Path(benchmarks.__file__).parent
TABLES = sorted(path.stem for path in FOLDER.glob("*.toml"))
SUITES = ("suite", "chat")


def test_the_package_knows_nothing_of_the_benchmarks() -> None:
    for folder in ("fedpet", "strategies", "simulations"):
        for path in (FOLDER.parent / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert "import benchmarks" not in text, path
            assert "from benchmarks" not in text, path


def test_no_module_of_the_benchmarks_has_the_name_of_another() -> None:
    names = [path.stem for path in FOLDER.rglob("*.py") if path.stem != "__init__"]
    assert sorted(names) == sorted(set(names))


def test_the_page_names_every_table_and_every_command() -> None:
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    for table in TABLES:
        assert f"`{table}.toml" in page, table
    for path in FOLDER.glob("*.py"):
        if "__main__" in path.read_text(encoding="utf-8") and path.stem != "__main__":
            assert f"python -m benchmarks.{path.stem}" in page, path.stem


@pytest.mark.parametrize("table", [table for table in TABLES if table not in SUITES])
def test_every_committed_cell_of_a_table_reads(table: str) -> None:
    grid = read_grid(FOLDER / f"{table}.toml")
    files = {path for path in grid.results.rglob("*.json") if path.name != "checks.json"}
    known = {cell.path: cell for phase in ("structures", "tune", "final")
             for cell in grid.known_cells(phase)}  # fmt: skip
    assert files
    assert files <= known.keys()  # a renamed method would leave its cells unseen
    for path in files:
        assert known[path].read() is not None


@pytest.mark.parametrize("name", SUITES)
def test_every_committed_cell_of_a_suite_reads_and_is_seen(name: str) -> None:
    suite = read_suite(FOLDER / f"{name}.toml")
    files = {path for path in suite.results.rglob("*.json") if path.name != "checks.json"}
    structures = {path for path in files if path.parent.name == "structures"}
    known = {cell.path for cell in suite.finished()}  # reading refuses other settings
    assert files - structures == known


def test_a_cell_of_former_names_reads_under_the_present_ones() -> None:
    former = {
        "backbone": {"model": "embedded"},
        "population": {"partition": "dirichlet", "alpha": 0.1},
        "codec": {"up": "eden-4", "downlink": "changes"},
        "structure": {"file": "simulations/benchmarks/results/a/structures/central-seed0.json"},
        "training": {"first-token-only": True},
    }
    experiment = stored_experiment(former)
    assert experiment.backbone.model == "bundled"
    assert experiment.clients.dirichlet_alpha == 0.1
    assert experiment.codec.uplink == "eden-4"
    assert experiment.codec.downlink_mode == "delta"
    assert experiment.training.cls_only
    assert experiment.structure.file == "benchmarks/results/a/structures/central-seed0.json"


def test_a_committed_central_cell_of_other_settings_is_refused(tmp_path: Path) -> None:
    grid = read_grid(FOLDER / "search.toml")
    cell = next(iter(grid.cells("tune")))
    assert isinstance(cell, CentralCell)
    content = json.loads(cell.path.read_text(encoding="utf-8"))
    content["settings"]["training"]["batch_size"] = 3
    copy = tmp_path / cell.path.name
    copy.write_text(json.dumps(content), encoding="utf-8")
    other = type(cell)(**{**vars(cell), "path": copy})
    with pytest.raises(ConfigError, match="batch_size was 3, is 16"):
        other.read()
