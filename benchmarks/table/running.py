"""Works a table off: tunes, runs the finals, runs a sample again.

In:  a `TableFile`.
Out: its cells' files, and `checks.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cells import Work
from benchmarks.table.cell import Run, fingerprint, read_cell, run_in_process, work_of
from benchmarks.table.file import Cell, Method, Rate, TableFile
from fedpet.errors import ConfigError
from fedpet.report.number_format import show_metric

PHASES = ("tune", "final")


@dataclass
class TableRun:
    """Runs what is missing of a table, and says how it goes.

    Args:
        table: What to run.
        say: Shows one line.
        run: Runs one cell; by default in a process of its own.
    """

    table: TableFile
    say: Callable[[str], None]
    run: Run | None = None
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [method.name for method in self.table.methods]
        for name in self.only:
            if name not in names:
                raise ConfigError(f"unknown method {name!r}. The table's are: {', '.join(names)}.")

    @property
    def methods(self) -> list[Method]:
        """The methods that are asked for."""
        return [m for m in self.table.methods if not self.only or m.name in self.only]

    def tune(self) -> None:
        """Run every method at every rate of its grid."""
        self._work.complete([cell for m in self.methods for cell in self.table.tune_cells(m)])

    def final(self) -> None:
        """Run every method at its best rate, with every seed.

        Raises:
            ConfigError: A method is not tuned yet.
        """
        best = {method.name: self.best_rate(method) for method in self.methods}
        self._work.complete(
            [cell for m in self.methods for cell in self.table.final_cells(m, best[m.name])]
        )

    def tuned(self, method: Method) -> dict[Rate, float]:
        """Rate -> metric on the tuning split, of the cells that are there, in rising order."""
        return scores(self.table.tune_cells(method))

    def best_rate(self, method: Method) -> Rate:
        """The rate of the highest metric, of equals the smaller one; or the only one.

        Raises:
            ConfigError: A cell of the grid has not been run, or learned nothing at any rate.
        """
        if len(method.rates) == 1:
            return method.rates[0]
        return best_rate(method.name, self.table.tune_cells(method))

    def final_results(self) -> list[Path]:
        """Files of the finished final cells."""
        return [
            path
            for method in self.methods
            for seed in self.table.final_seeds
            if (path := self.table.results / "final" / f"{method.name}-seed{seed}.json").exists()
        ]

    def check(self, count: int, phases: Iterable[str] = PHASES) -> bool:
        """Run a random sample of the finished cells again and compare.

        What came out is appended to RESULTS/checks.json.

        Returns:
            Whether all are the same to the bit.
        """
        notes = self.table.results / "checks.json"
        return self._work.check(self._known_cells(phases), count, notes)

    def _known_cells(self, phases: Iterable[str]) -> list[Cell]:
        cells = [c for m in self.methods for c in self.table.tune_cells(m) if "tune" in phases]
        if "final" in phases:
            for method in self.methods:
                if all(map(read_cell, self.table.tune_cells(method))):
                    cells += self.table.final_cells(method, self.best_rate(method))
        return cells

    @property
    def _work(self) -> Work[Cell]:
        limit = self.table.timeout_seconds
        run = self.run or (lambda cell, folder: run_in_process(cell, folder, limit))
        return work_of(run, self.say, _show, fingerprint)


def scores(cells: Iterable[Cell]) -> dict[Rate, float]:
    """Rate -> metric, of the cells that are there.

    A run that learned nothing (its loss became infinite, say) is no candidate.
    """
    found = {}
    for cell in cells:
        result = read_cell(cell)
        if result is not None and result["run"]["status"] == "ok":
            found[cell.rate] = float(result["quality"]["final"])
    return found


def best_rate(method: str, cells: Sequence[Cell]) -> Rate:
    """The rate of the highest metric; of equals the smaller one.

    Raises:
        ConfigError: A cell of the grid has not been run, or learned nothing at any rate.
    """
    missing = [cell.name for cell in cells if read_cell(cell) is None]
    if missing:
        raise ConfigError(
            f"the rate of {method!r} is not settled: {', '.join(missing)} have not been run. Run "
            "the phase 'tune' first."
        )
    tuned = scores(cells)
    if not tuned:
        raise ConfigError(f"{method!r} learned nothing at any rate of its grid: lower its rates.")
    return min(tuned, key=lambda rate: (-tuned[rate], rate))


def _show(result: Mapping[str, Any]) -> str:
    quality, status = result["quality"], result["run"]["status"]
    shown = f"{quality['metric']} {show_metric(quality['final'])}"
    return shown if status == "ok" else f"{shown}, {status}"
