"""Searches of a structure by many clients: the settings that most have, and what a run left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny
from tiny import Silent

from fedpet.pet.structure import Structure
from fedpet.run.federate import PreparedSearch, prepare

BUDGET = 600
SEARCH = {
    "search_federated": True,
    "search_budget": BUDGET,
    "search_batch_size": 4,
    "search_learning_rate": 0.01,
    "search_rounds": 3,
    "search_local_steps": 1,
    "strategy_num_rounds": 1,
    "strategy_clients_per_round": 6,
}


def lines_of(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "rounds.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line.get("kind", "training") == kind]


def structure_of(run: Path) -> Structure:
    return Structure.from_json((run / "structure.json").read_text(encoding="utf-8"))


def ready_to_search(files: tuple[Path, Path], out: Path) -> PreparedSearch:
    """A run before its search."""
    prepared = prepare(tiny.make_experiment(*files, out, **SEARCH), Silent())
    assert isinstance(prepared, PreparedSearch)
    return prepared
