"""A cell of the table: one search, or one training of one structure, and the file it leaves.

In:  a `Cell`.
Out: what came out and the settings that decide it, in the cell's file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.cells import commit, with_new_fields, write_json
from fedpet.config import BackboneConfig, SearchConfig, TrainingConfig
from fedpet.errors import ConfigError
from fedpet.run.run_folder import machine, versions

SCHEMA = 1


@dataclass(frozen=True)
class Rows:
    """Which rows of which data set: a sample of the training split, and what is evaluated."""

    dataset: str
    metric: str
    text_columns: tuple[str, ...]
    max_length: int
    train_rows: int
    held_rows: int  # the next ones of the sample, for tuning
    eval_splits: tuple[str, ...]  # () evaluates on the held rows
    logit_adjustment: float = 0.0


@dataclass(frozen=True)
class Cell:
    """One piece of work: everything that decides it, and its file RESULTS/PHASE/NAME.json."""

    path: Path
    backbone: BackboneConfig
    rows: Rows
    search: SearchConfig  # of the structure; its method is "s3pet", "random", or presets
    training: TrainingConfig | None = None  # None: the structure itself is the result
    seed: int = 0  # of the training
    found_by: Path | None = None  # the file of the cell whose structure is trained

    @property
    def name(self) -> str:
        """PHASE/NAME, as people see it."""
        return f"{self.path.parent.name}/{self.path.stem}"

    def settings(self) -> dict[str, Any]:
        """What decides the outcome."""
        found: dict[str, Any] = {
            "backbone": asdict(self.backbone),
            "rows": asdict(self.rows),
            "search": asdict(self.search),
            "training": None if self.training is None else asdict(self.training),
            "seed": self.seed,
            "found_by": None if self.found_by is None else self.found_by.stem,
        }
        plain: dict[str, Any] = json.loads(json.dumps(found))
        return plain


def read_cell(cell: Cell) -> dict[str, Any] | None:
    """The result of a finished cell; None where there is none yet.

    Raises:
        ConfigError: The file there is of other settings.
    """
    if not cell.path.exists():
        return None
    try:
        content = json.loads(cell.path.read_text(encoding="utf-8"))
        stored, result = content["settings"], dict(content["result"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{str(cell.path)!r} is no cell of a table: {error!r}.") from None
    differing = _differing(stored, cell.settings())
    if differing:
        raise ConfigError(
            f"the cell {cell.name} was run with other settings: {'; '.join(differing)}. Remove "
            f"{str(cell.path)!r} to run it again, or name another folder with the table file's "
            "key 'results'."
        )
    return result


def write_cell(cell: Cell, result: dict[str, Any]) -> None:
    """Leave a finished cell, whole or not at all."""
    content = {
        "schema": SCHEMA,
        "phase": cell.path.parent.name,
        "settings": cell.settings(),
        "result": result,
        "commit": commit(),
        "versions": versions(),
        "machine": machine(),
    }
    write_json(cell.path, content)


def _differing(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What tells two settings apart; a key that one lacks has its default there."""
    defaults = {
        "backbone": asdict(BackboneConfig()),
        "rows": {"logit_adjustment": 0.0},
        "search": asdict(SearchConfig()),
        "training": asdict(TrainingConfig()),
    }
    found = []
    for stage, value in wanted.items():
        before = stored.get(stage)
        if isinstance(before, dict):
            before = with_new_fields(stage, before)
        if isinstance(value, dict) and isinstance(before, dict):
            table = {**json.loads(json.dumps(defaults.get(stage, {}))), **before}
            found += [
                f"{stage}.{key} was {table.get(key)!r}, is {new!r}"
                for key, new in value.items()
                if table.get(key) != new
            ]
        elif before != value:
            found.append(f"{stage} was {before!r}, is {value!r}")
    return found
