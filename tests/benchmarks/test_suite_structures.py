"""Structures are made before the runs that train them: drawn, searched, searched by clients."""

from __future__ import annotations

from pathlib import Path

import pytest
from suite_jobs import Pretend, letters, suite_of, tables

from benchmarks.suite_tables import clients_searches
from fedpet.errors import ConfigError


def test_structures_are_made_before_the_runs_that_train_them(tmp_path: Path) -> None:
    content = tables()
    content["methods"]["searched"] = {
        "runs": "fedpet", "rate": 0.1, "structure": "drawn",
        "set": ["search.method=random", "search.budget=500"],
    }  # fmt: skip
    content["work"] = [{"datasets": ["films"], "methods": ["searched"]}]
    suite = suite_of(tmp_path, content=content)
    first = suite.runnable()
    assert [cell.path.parent.name for cell in first] == ["structures"]
    (cell,) = first
    assert cell.seed == suite.tune_seed
    assert cell.experiment.data.eval_split == "validation"  # type: ignore[attr-defined]


@pytest.mark.parametrize("how", ["random", "lnfit+bitfit", "s3pet"])
def test_a_structure_is_made_once_within_the_budget_and_names_no_folder(
    tmp_path: Path, how: str
) -> None:
    content = tables(base=letters(tmp_path))
    content["methods"]["drawn"] = {
        "runs": "fedpet", "rate": 0.1, "structure": "drawn",
        "set": [f"search.method={how}", "search.budget=500", "search.max-steps=2"],
    }  # fmt: skip
    content["work"] = [{"datasets": ["letters"], "methods": ["drawn"]}]
    suite = suite_of(tmp_path, content=content, folder=tmp_path / "sets")
    (cell,) = suite.runnable()
    made = cell.run()["structure"]
    assert 0 < made.provenance["values"] <= 500
    assert made.provenance["data"]["source"] == "letters"
    assert str(tmp_path) not in cell.path.read_text().replace(str(tmp_path / "backbone"), "")
    again = suite_of(tmp_path, content=content, folder=tmp_path / "sets")
    assert [cell.path.parent.name for cell in again.runnable()] == ["tune"] * 3
    content["methods"]["drawn"]["set"][1] = "search.budget=400"
    with pytest.raises(ConfigError, match="made with other settings"):
        suite_of(tmp_path, content=content).runnable()


def test_clients_search_before_they_train_and_the_table_says_what_it_cost(tmp_path: Path) -> None:
    content = tables(base=letters(tmp_path))
    content["methods"]["by-clients"] = {
        "runs": "fedpet", "rates-of": "mask", "structure": "searched",
        "set": [
            "mask.enabled=true", "search.space=joint", "search.mask-block=16",
            "search.budget=500", "search.federated=true", "search.sends=gates",
            "search.rounds=2", "search.local-steps=1", "search.batch-size=4",
        ],
    }  # fmt: skip
    content["work"] = [{"datasets": ["letters"], "methods": ["mask", "by-clients"]}]
    suite = suite_of(tmp_path, Pretend(), content=content, folder=tmp_path / "sets")
    dataset, method = suite.datasets["letters"], suite.methods["by-clients"]
    first, other = (suite.structure_cell(dataset, method, seed) for seed in (0, 1))
    made = first.run()["structure"]
    assert 0 < made.provenance["values"] <= 500
    cost = made.provenance["search"]
    assert cost["rounds"] == 2
    assert cost["uplink_bytes"] > 0
    assert cost["processor_seconds"] >= 0
    assert first.experiment.run.seed != other.experiment.run.seed  # each draws its own clients
    assert first.read() is not None
    assert clients_searches(suite).startswith("No cell")  # nothing has been trained yet
    for seed in (1, 2):
        suite.structure_cell(dataset, method, seed).run()
    suite.complete(lambda line: None)
    line = clients_searches(suite).splitlines()[-1]
    assert line.startswith("| letters | 3 | 2.0 | ")
