"""The benchmarks of codecs compare like with like."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.tables import read_grid
from fedpet.codec import check_codecs
from fedpet.config import Experiment

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["codecs", "codecs_dirichlet"])
def test_rows_differ_in_their_codec_and_nothing_else(name: str) -> None:
    shipped = read_grid(REPOSITORY / "benchmarks" / f"{name}.toml")
    rates = {method.rates for method in shipped.methods}
    cells = [shipped.final_cells(m)[0] for m in shipped.methods]
    codecs = [Experiment.from_tables(cell.settings()).codec for cell in cells]
    for codec in codecs:
        check_codecs(codec)
    tables = [cell.settings() for cell in cells]
    assert [table.pop("codec") for table in tables]
    assert all(table == tables[0] for table in tables)
    assert len(rates) == 1
    assert {codecs[0].uplink, codecs[0].downlink} == {"float32"}
    assert len(set(codecs)) == len(codecs) >= 8


def test_one_data_set_has_natural_clients_and_one_is_under_dirichlet_a_tenth() -> None:
    populations = []
    for name in ("codecs", "codecs_dirichlet"):
        shipped = read_grid(REPOSITORY / "benchmarks" / f"{name}.toml")
        assert len(shipped.seeds) == 3
        method = shipped.methods[0]
        cell = shipped.final_cells(method)[0]
        populations.append(Experiment.from_tables(cell.settings()).clients)
    assert [p.partition for p in populations] == ["column", "dirichlet"]
    assert populations[1].dirichlet_alpha == 0.1
