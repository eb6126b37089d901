"""Works the table of structures off: searches, settles rates, trains with every seed, shows.

In:  a `SearchTable`, the folder of the data sets.
Out: its cells' files, `checks.json`, and the table.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.cells import Work
from benchmarks.search_table.cell import Cell, Rows, read_cell, write_cell
from benchmarks.search_table.file import Dataset, SearchTable
from benchmarks.search_table.training import run_cell
from benchmarks.table.file import Rate
from fedpet.errors import ConfigError

PHASES = ("structures", "tune", "final")
Budget = str | int | float
Run = Callable[[Cell, Path, Path], dict[str, Any]]


@dataclass
class SearchTableRun:
    """Runs what is missing of a table, and says how it goes.

    Args:
        table: What to run.
        data: Folder of the data sets.
        cache: For tokenised rows.
        say: Shows one line.
        jobs: Cells at once, each on one thread, in processes of their own where more than one.
        run: Runs one cell.
    """

    table: SearchTable
    data: Path
    cache: Path
    say: Callable[[str], None]
    jobs: int = 1
    run: Run = run_cell

    def complete(self, phases: Iterable[str] = PHASES) -> None:
        """Run what is missing of the phases, in their order."""
        for phase in PHASES:
            if phase in phases:
                self._complete(list(self.cells(phase)))

    def _complete(self, cells: list[Cell]) -> None:
        self._work_off(lambda work: work.complete(cells, jobs=self.jobs))

    def check(self, count: int, phases: Iterable[str] = PHASES) -> bool:
        """Run a random sample of the finished cells again; True where all are the same."""
        cells = [cell for phase in PHASES if phase in phases for cell in self.known(phase)]
        notes = self.table.results / "checks.json"
        same: list[bool] = []
        self._work_off(lambda work: same.append(work.check(cells, count, notes)))
        return same[0]

    # -- cells

    @property
    def methods(self) -> tuple[str, ...]:
        """The rows of a data set and budget."""
        return ("searched", *self.table.variants, "random", "manual", "transfer")

    def cells(self, phase: str) -> Iterator[Cell]:
        """The cells of a phase.

        Raises:
            ConfigError: An earlier phase is not finished.
        """
        for dataset in self.table.datasets:
            for budget in self.table.budgets:
                if phase == "structures":
                    for seed in (self.table.tune_seed, *self.table.seeds):
                        yield self.structure_cell(dataset, budget, seed)
                    for variant in self.table.variants:
                        for seed in self.table.seeds:
                            yield self.structure_cell(dataset, budget, seed, variant)
                elif phase == "tune":
                    for method in ("searched", "random", *self.table.presets):
                        yield from self.tune_cells(dataset, budget, method)
                else:
                    for method in self.methods:
                        yield from self.final_cells(dataset, budget, method)

    def known(self, phase: str) -> list[Cell]:
        """The cells of a phase, as far as earlier phases tell them."""
        try:
            return list(self.cells(phase))
        except ConfigError:
            return []

    def structure_cell(
        self, dataset: Dataset, budget: Budget, seed: int, variant: str = "searched"
    ) -> Cell:
        """The search of one seed."""
        search = self.table.variants.get(variant, self.table.search)
        search = replace(search, method="s3pet", budget=budget, seed=seed)
        of = "" if variant == "searched" else f"{variant}-"
        path = self._path("structures", dataset, budget, f"{of}seed{seed}")
        return Cell(path, self.table.backbone, self._rows(dataset, ()), search)

    def tune_cells(self, dataset: Dataset, budget: Budget, method: str) -> list[Cell]:
        """A cell a rate, of "searched", "random" or a preset; evaluated on the held rows."""
        seed = self.table.tune_seed
        return [
            self._training_cell(
                self._path("tune", dataset, budget, f"{method}-lr{_file_name(rate)}"),
                dataset, budget, method, rate, seed, draw=seed, held=True,
            )
            for rate in self.table.rates
        ]  # fmt: skip

    def final_cells(self, dataset: Dataset, budget: Budget, method: str) -> list[Cell]:
        """A cell a seed, or as many as there are random structures."""
        preset, rate = self.settled(dataset, budget, method)
        cells = []
        for seed in self.table.seeds:
            draws = range(self.table.random_structures) if method == "random" else (0,)
            for draw in draws:
                what = f"{method}{draw}" if method == "random" else method
                for source in self._sources(dataset) if method == "transfer" else (dataset,):
                    name = f"from-{source.name}" if method == "transfer" else what
                    path = self._path("final", dataset, budget, f"{name}-seed{seed}")
                    how = preset if method == "manual" else method
                    cells.append(
                        self._training_cell(
                            path, dataset, budget, how, rate, seed, draw=draw, source=source
                        )
                    )
        return cells

    def settled(self, dataset: Dataset, budget: Budget, method: str) -> tuple[str, Rate]:
        """What tuning chose: a preset (of "manual") and a rate; of equals the smaller rate.

        Raises:
            ConfigError: A cell of the grid has not been run.
        """
        of_searched = method == "transfer" or method in self.table.variants
        tuned = "searched" if of_searched else method
        names = self.table.presets if method == "manual" else (tuned,)
        scores: dict[tuple[str, Rate], float] = {}
        for name in names:
            for rate, cell in zip(
                self.table.rates, self.tune_cells(dataset, budget, name), strict=True
            ):
                result = read_cell(cell)
                if result is None:
                    raise ConfigError(
                        f"the rate of {method!r} is not settled: {cell.name} has not been run. "
                        "Run the phase 'tune' first."
                    )
                scores[name, rate] = float(result["score"])
        return min(scores, key=lambda key: (-scores[key], key[1], names.index(key[0])))

    # -- small things

    def _sources(self, dataset: Dataset) -> list[Dataset]:
        return [other for other in self.table.datasets if other.name != dataset.name]

    def _rows(self, dataset: Dataset, eval_splits: tuple[str, ...]) -> Rows:
        return Rows(
            dataset=dataset.name,
            metric=dataset.metric,
            text_columns=dataset.text_columns,
            max_length=self.table.max_length,
            train_rows=self.table.train_rows,
            held_rows=0 if eval_splits else self.table.tune_rows,
            eval_splits=eval_splits,
            logit_adjustment=dataset.logit_adjustment,
        )

    def _training_cell(
        self,
        path: Path,
        dataset: Dataset,
        budget: Budget,
        method: str,
        rate: Rate,
        seed: int,
        *,
        draw: int,
        held: bool = False,
        source: Dataset | None = None,
    ) -> Cell:
        found_by = None
        search = replace(self.table.search, method=method, budget=budget, seed=seed)
        if method in ("searched", "transfer", *self.table.variants):
            variant = "searched" if method == "transfer" else method
            structure = self.structure_cell(source or dataset, budget, seed, variant)
            search, found_by = structure.search, structure.path
        elif method == "random":
            search = replace(search, seed=1000 * seed + draw)
        else:
            search = replace(search, seed=0)
        return Cell(
            path=path,
            backbone=self.table.backbone,
            rows=self._rows(dataset, () if held else dataset.eval_splits),
            search=search,
            training=self.table.training_at(rate),
            seed=seed,
            found_by=found_by,
        )

    def _path(self, phase: str, dataset: Dataset, budget: Budget, name: str) -> Path:
        return self.table.results / phase / f"{dataset.name}-b{budget}-{name}.json"

    def _work_off(self, do: Callable[[Work[Cell]], None]) -> None:
        pool: AbstractContextManager[ProcessPoolExecutor | None] = nullcontext()
        if self.jobs > 1:
            spawn = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(self.jobs, mp_context=spawn)
        with pool as workers:

            def run(cell: Cell) -> dict[str, Any]:
                if workers is None:
                    return self.run(cell, self.data, self.cache)
                return workers.submit(self.run, cell, self.data, self.cache).result()

            do(Work(read_cell, run, write_cell, _show, _fingerprint, self.say))


def _show(result: dict[str, Any]) -> str:
    return f"{result['score']:.4f}"


def _fingerprint(result: dict[str, Any]) -> dict[str, Any]:
    """What has to come out again, to the bit."""
    return {name: result[name] for name in ("sha256", "score")}


def _file_name(rate: Rate) -> str:
    return str(rate).replace(" ", "-").replace("=", "")
