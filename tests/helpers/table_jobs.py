"""Tables of methods whose runs are made up."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from report_runs import make_result

from benchmarks.table import Cell, TableFile, TableRun


class Fake:
    """Stands in for a run: counts them, and gives the metric that `score` says."""

    def __init__(self, score: Callable[[Cell], float] = lambda cell: 0.5) -> None:
        self.ran: list[str] = []
        self.cells: list[Cell] = []
        self._score = score

    def __call__(self, cell: Cell, folder: Path) -> dict[str, Any]:
        self.ran.append(cell.name)
        self.cells.append(cell)
        seed, final = cell.experiment.run.seed, self._score(cell)
        result = make_result(method=cell.method.runs, seed=seed, final=max(final, 0.0))
        if math.isnan(final):
            result["run"]["status"] = "nothing learned"
        return result


def job(path: Path, fake: Fake, **kwargs: Any) -> TableRun:
    return TableRun(TableFile.read(path), lambda line: None, fake, **kwargs)
