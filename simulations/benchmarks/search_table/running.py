"""Works the table of structures off: searches, settles rates, trains with every seed, shows.

In:  a `SearchTable`, the folder of the data sets.
Out: its cells' files, `checks.json`, and the table.
"""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from fedpet.errors import ConfigError

from ..cells import Work
from ..table.file import Rate
from .cell import Cell, Rows, read_cell, write_cell
from .file import Dataset, SearchTable
from .training import run_cell

PHASES = ("structures", "tune", "final")
METHODS = ("searched", "random", "manual", "transfer")
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
                elif phase == "tune":
                    for method in ("searched", "random", *self.table.presets):
                        yield from self.tune_cells(dataset, budget, method)
                else:
                    for method in METHODS:
                        yield from self.final_cells(dataset, budget, method)

    def known(self, phase: str) -> list[Cell]:
        """The cells of a phase, as far as earlier phases tell them."""
        try:
            return list(self.cells(phase))
        except ConfigError:
            return []

    def structure_cell(self, dataset: Dataset, budget: Budget, seed: int) -> Cell:
        """The search of one seed."""
        search = replace(self.table.search, method="s3pet", budget=budget, seed=seed)
        path = self._path("structures", dataset, budget, f"seed{seed}")
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
        tuned = "searched" if method == "transfer" else method
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

    # -- tables

    def tuning_table(self) -> Table:
        """The metric on the held rows at each rate; what is taken is in bold."""
        title = f"tuned on {self.table.tune_rows} held rows, seed {self.table.tune_seed}"
        shown = Table(title=title, title_justify="left", box=None)
        for head in ("data", "budget", "structure"):
            shown.add_column(head)
        for rate in self.table.rates:
            shown.add_column(str(rate), justify="right")
        for dataset in self.table.datasets:
            for budget in self.table.budgets:
                taken = [self.settled(dataset, budget, method) for method in METHODS[:3]]
                for name in ("searched", "random", *self.table.presets):
                    texts = []
                    for rate, cell in zip(
                        self.table.rates, self.tune_cells(dataset, budget, name), strict=True
                    ):
                        score = (read_cell(cell) or {})["score"]
                        style = "bold" if (name, rate) in taken else ""
                        texts.append(Text(f"{score:.4f}", style=style))
                    shown.add_row(dataset.name, str(budget), name, *texts)
        return shown

    def final_table(self) -> Table:
        """Mean and deviation over the seeds; what each method was set to."""
        shown = Table(title="mean over seeds, deviation over seeds", title_justify="left", box=None)
        for head in ("data", "budget", "structure", "metric", "", "values", "set to"):
            shown.add_column(head, justify="right" if head in ("metric", "values") else "left")
        for row in self.summary():
            shown.add_row(
                row["dataset"],
                str(row["budget"]),
                row["method"],
                f"{row['mean']:.4f}",
                f"± {row['deviation']:.4f}",
                f"{row['values']:,.0f}",
                row["set_to"],
            )
        return shown

    def summary(self) -> list[dict[str, Any]]:
        """A row for each data set, budget and method whose final cells are all there.

        A seed's score is the mean over what it has several of: random structures, sources.
        """
        rows = []
        for dataset in self.table.datasets:
            for budget in self.table.budgets:
                for method in METHODS:
                    cells = self.final_cells(dataset, budget, method)
                    results = [(cell.seed, read_cell(cell)) for cell in cells]
                    if not results or any(result is None for _, result in results):
                        continue
                    by_seed = [
                        statistics.mean(float((r or {})["score"]) for s, r in results if s == seed)
                        for seed in self.table.seeds
                    ]
                    preset, rate = self.settled(dataset, budget, method)
                    rows.append(
                        {
                            "dataset": dataset.name,
                            "budget": budget,
                            "method": method,
                            "mean": statistics.mean(by_seed),
                            "deviation": statistics.stdev(by_seed) if len(by_seed) > 1 else 0.0,
                            "by_seed": by_seed,
                            "values": statistics.mean(
                                float((r or {})["structure_values"]) for _, r in results
                            ),
                            "set_to": f"{preset + ', ' if method == 'manual' else ''}{rate}",
                        }
                    )
        return rows

    def overlaps(self) -> list[tuple[str, str, float]]:
        """How alike searched structures are: Jaccard index over modules, by what differs."""
        found: list[tuple[str, str, float]] = []
        for budget in self.table.budgets:
            sets: dict[str, list[set[tuple[str, str]]]] = {}
            for dataset in self.table.datasets:
                for seed in self.table.seeds:
                    result = read_cell(self.structure_cell(dataset, budget, seed))
                    if result is not None:
                        modules = result["structure"]["modules"]
                        chosen = {(m["kind"], m["target"]) for m in modules}
                        sets.setdefault(dataset.name, []).append(chosen)
            names = list(sets)
            for index, one in enumerate(names):
                pairs = [
                    _jaccard(a, b) for i, a in enumerate(sets[one]) for b in sets[one][i + 1 :]
                ]
                if pairs:
                    found.append((str(budget), f"{one}, seeds", statistics.mean(pairs)))
                for other in names[index + 1 :]:
                    pairs = [_jaccard(a, b) for a in sets[one] for b in sets[other]]
                    found.append((str(budget), f"{one} and {other}", statistics.mean(pairs)))
        return found

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
        if method in ("searched", "transfer"):
            structure = self.structure_cell(source or dataset, budget, seed)
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


def _jaccard(one: set[Any], other: set[Any]) -> float:
    return len(one & other) / max(1, len(one | other))
