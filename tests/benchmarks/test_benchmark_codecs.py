"""The benchmarks of codecs compare like with like."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.table import TableFile
from fedpet.codec import check_codecs
from fedpet.config import CodecConfig

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["codecs", "codecs_dirichlet"])
def test_rows_differ_in_their_codec_and_nothing_else(name: str) -> None:
    shipped = TableFile.read(REPOSITORY / "benchmarks" / f"{name}.toml")
    rates = {method.rates for method in shipped.methods}
    cells = [shipped.final_cells(m, m.rates[0])[0] for m in shipped.methods]
    codecs = [cell.experiment.codec for cell in cells]
    for codec in codecs:
        check_codecs(codec)
    tables = [cell.settings() for cell in cells]
    assert [table.pop("codec") for table in tables]
    assert all(table == tables[0] for table in tables)
    assert len(rates) == 1
    assert codecs[0] == CodecConfig()
    assert len(set(codecs)) == len(codecs) >= 8


def test_one_data_set_has_natural_clients_and_one_is_under_dirichlet_a_tenth() -> None:
    populations = []
    for name in ("codecs", "codecs_dirichlet"):
        shipped = TableFile.read(REPOSITORY / "benchmarks" / f"{name}.toml")
        assert len(shipped.final_seeds) == 3
        method = shipped.methods[0]
        populations.append(shipped.final_cells(method, method.rates[0])[0].experiment.clients)
    assert [p.partition for p in populations] == ["column", "dirichlet"]
    assert populations[1].dirichlet_alpha == 0.1
