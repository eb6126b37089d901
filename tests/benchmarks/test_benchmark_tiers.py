"""The benchmark of tiers compares like with like."""

from __future__ import annotations

from pathlib import Path

from benchmarks.tables import read_grid
from fedpet.config import Experiment

REPOSITORY = Path(__file__).resolve().parents[2]


def test_tiers_differ_from_a_federation_of_strong_devices_in_nothing_but_the_tiers() -> None:
    shipped = read_grid(REPOSITORY / "benchmarks" / "tiers.toml")
    rate = shipped.methods[0].rates[0]  # each has a grid of its own
    cells = {m.name: shipped.seed_cells(None, m, m.name, rate, 0)[0] for m in shipped.methods}
    assert list(cells) == ["all-strong", "three-tiers", "all-weak"]
    tables = {name: cell.settings() for name, cell in cells.items()}
    assert len(tables["three-tiers"]["mask"].pop("tiers")) == 3
    assert tables["all-strong"]["mask"].pop("tiers") == []
    assert tables["three-tiers"] == tables["all-strong"]
    tables["all-strong"]["mask"]["density"] = 0.001
    assert Experiment.from_tables(tables["all-weak"]) == Experiment.from_tables(
        tables["all-strong"]
    )
