"""Work off the suite: data sets x methods, each tuned on rows of its own, then run on its seeds.

A cell leaves RESULTS/DATA SET/PHASE/NAME.json, and one that is there is not run again.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.cell import Cell, Result, Run, check
from benchmarks.moving_grid import Choice, choose_rate
from benchmarks.one_process import FEDPET
from benchmarks.probe import PROBE
from benchmarks.rate import Rate
from benchmarks.structure_file import StructureFile
from benchmarks.suite_cell import SuiteCell
from fedpet.config import Experiment
from fedpet.config.parsing import field_types, with_overrides
from fedpet.errors import FedpetError
from fedpet.training.metrics import greater_is_better
from fedpet.utils.atomic_write import atomic_write

__all__ = ["DataSet", "Row", "Suite", "run_cell"]

PHASES = ("structures", "tune", "final")


@dataclass(frozen=True)
class DataSet:
    """Describe the rows and clients of a part of the suite.

    Attributes:
        name: Of the part.
        overrides: Of the experiment.
        tune: Overrides where rates are chosen.
        final: Overrides of reported runs.
        seconds: Guess of a cell's time, until one has been run.
        also: Further splits on which reported runs evaluate their start and end.
    """

    name: str
    overrides: tuple[str, ...] = ()
    tune: tuple[str, ...] = ()
    final: tuple[str, ...] = ()
    seconds: float = 60.0
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """Describe a method.

    Attributes:
        name: Of the row.
        runs: Of `RUNS`, or the probe.
        rate: Where its grid starts; 0 where nothing is trained.
        beside: Rates of the kinds that have one of their own.
        rates_of: The method whose rates it takes; "" for its own.
        overrides: Of the experiment.
        structure: "searched", "drawn" or "".
        times: Guess of a cell's time in those of other methods, until one has been run.
        seeds: A reported run each; () for those of the suite.
    """

    name: str
    runs: str
    rate: float
    beside: tuple[str, ...]
    rates_of: str
    overrides: tuple[str, ...]
    structure: str
    times: float = 1.0
    seeds: tuple[int, ...] = ()


@dataclass
class Suite:
    """Lay out the cells, and run the missing ones.

    Attributes:
        results: Folder of the cells.
        base: Tables of the experiment that all start from.
        datasets: By name.
        methods: By name.
        work: Pairs of a data set and a method, the most needed first.
        tune_seed: Of all tuning runs.
        seeds: A reported run each, of methods without seeds of their own.
        most_rates: Of a moving grid.
        folder: Of the data sets.
        run: Runs a cell; a test's own.
    """

    results: Path
    base: Mapping[str, Any]
    datasets: Mapping[str, DataSet]
    methods: Mapping[str, Row]
    work: tuple[tuple[DataSet, Row], ...]
    tune_seed: int
    seeds: tuple[int, ...]
    most_rates: int
    folder: Path | None = None
    run: Run | None = None
    _read: dict[Path, Result] = field(default_factory=dict)
    _experiments: dict[tuple[str, ...], Experiment] = field(default_factory=dict)

    # -- cells

    def experiment(self, dataset: DataSet, method: Row, more: Sequence[str] = ()) -> Experiment:
        """Resolve a cell's experiment."""
        over = (*dataset.overrides, *method.overrides, *more)
        if over not in self._experiments:
            self._experiments[over] = self._resolve(over)
        return self._experiments[over]

    def _resolve(self, over: Sequence[str]) -> Experiment:
        tables = {stage: dict(table) for stage, table in self.base.items()}
        return Experiment.from_tables(with_overrides(tables, over, field_types(Experiment)))

    def tune_cell(self, dataset: DataSet, method: Row, rate: float) -> SuiteCell:
        """Return the cell of one rate, evaluated before the first round and after the last."""
        rounds = self.experiment(dataset, method).strategy.num_rounds
        more = (*dataset.tune, f"strategy.evaluate-every={rounds}")
        return self._cell(dataset, method, "tune", f"lr{rate:g}", rate, self.tune_seed, more)

    def final_cells(self, dataset: DataSet, method: Row, rate: float) -> list[SuiteCell]:
        """Return the reported cells, by seed."""
        return [
            self._cell(dataset, method, "final", f"seed{seed}", rate, seed, dataset.final)
            for seed in self.seeds_of(method)
        ]

    def seeds_of(self, method: Row) -> tuple[int, ...]:
        """Return the seeds of a method's reported runs; the probe draws nothing, and has one."""
        seeds = method.seeds or self.seeds
        return seeds[:1] if method.runs == PROBE else seeds

    def structure_cell(self, dataset: DataSet, method: Row, seed: int) -> StructureFile:
        """Return the file of the structure that a seed's run trains, searched on tuning rows."""
        path = self.results / dataset.name / "structures" / f"{method.name}-seed{seed}.json"
        experiment = self.experiment(dataset, method, (*dataset.tune, f"search.seed={seed}"))
        if experiment.search.federated:  # its seed draws the clients of each round
            experiment = replace(experiment, run=replace(experiment.run, seed=seed))
        return _Structure(path, None, seed, None, experiment, self.folder)

    def _cell(
        self,
        dataset: DataSet,
        method: Row,
        phase: str,
        end: str,
        rate: float,
        seed: int,
        more: Sequence[str],
    ) -> SuiteCell:
        over = [*more, f"run.seed={seed}", f"run.name={dataset.name}"]
        if rate:
            over.append(f"training.learning-rate={rate!r}")
            over.append(f"training.learning-rates={json.dumps(list(method.beside))}")
        experiment = self.experiment(dataset, method, over)
        needs = None
        if method.structure:
            needs = self.structure_cell(dataset, method, seed).path
            name = f"structures/{needs.name}"
            experiment = replace(
                experiment,
                structure=replace(experiment.structure, file=name),
                search=replace(experiment.search, federated=False),  # it is over
            )
        return SuiteCell(
            path=self.results / dataset.name / phase / f"{method.name}-{end}.json",
            rate=Rate(rate, method.beside) if rate else None,
            seed=seed,
            needs=needs,
            experiment=experiment,
            method=method.name,
            runs=method.runs,
            folder=self.folder,
            also=dataset.also if phase == "final" else (),
        )

    # -- where the work stands

    def read(self, cell: Cell) -> Result | None:
        """Read a cell once; None where it has not been run."""
        if cell.path not in self._read:
            result = cell.read()
            if result is None:
                return None
            self._read[cell.path] = result
        return self._read[cell.path]

    def choice(self, dataset: DataSet, method: Row) -> Choice:
        """Return where the choice of a method's rate stands."""
        tuned = self.methods[method.rates_of] if method.rates_of else method
        if not tuned.rate:
            return Choice((), (), 0.0)

        def score(rate: float) -> float | None:
            cell = self.tune_cell(dataset, tuned, rate)
            result = self.read(cell)
            if result is None:
                raise KeyError(rate)
            return cell.score(result)

        greater = greater_is_better(self.experiment(dataset, method).data.metric)
        return choose_rate(tuned.rate, score, most=self.most_rates, greater=greater)

    def runnable(self) -> list[Cell]:
        """Return the missing cells that wait for no other, the most needed first."""
        found: dict[Path, Cell] = {}
        for dataset, method in self.work:
            for cell in self._wanted(dataset, method):
                found.setdefault(cell.path, cell)
        return list(found.values())

    def _wanted(self, dataset: DataSet, method: Row) -> Iterator[Cell]:
        choice = self.choice(dataset, method)
        cells: list[SuiteCell] = []
        if choice.missing:
            tuned = self.methods[method.rates_of] if method.rates_of else method
            cells = [self.tune_cell(dataset, tuned, rate) for rate in choice.missing]
        elif choice.best is not None:
            cells = self.final_cells(dataset, method, choice.best)
        for cell in cells:
            if cell.needs is not None:
                owner = self.methods[cell.method]
                structure = self.structure_cell(dataset, owner, cell.seed)
                if self.read(structure) is None:
                    yield structure
                    continue
            if self.read(cell) is None:
                yield cell

    def results_of(self, dataset: DataSet, method: Row) -> dict[int, Result]:
        """Return the finished reported results by seed; {} while the rate is not chosen."""
        choice = self.choice(dataset, method)
        if choice.missing or choice.best is None:
            return {}
        cells = self.final_cells(dataset, method, choice.best)
        read = {cell.seed: self.read(cell) for cell in cells}
        return {seed: result for seed, result in read.items() if result is not None}

    def finished(self) -> list[Cell]:
        """Return all cells that have been run."""
        found: dict[Path, Cell] = {}
        for dataset, method in self.work:
            choice = self.choice(dataset, method)
            tuned = self.methods[method.rates_of] if method.rates_of else method
            cells = [self.tune_cell(dataset, tuned, rate) for rate in choice.tried]
            if choice.best is not None:
                cells += self.final_cells(dataset, method, choice.best)
            found |= {cell.path: cell for cell in cells if self.read(cell) is not None}
        return list(found.values())

    def read_results(self) -> list[Result]:
        """Return the results of all finished cells, structures left out."""
        return [result for cell in self.finished() if (result := self.read(cell)) is not None]

    # -- costs

    def seconds(self, dataset: DataSet, method: Row) -> float:
        """Estimate a cell's processor time: measured, else by other methods or data sets."""
        spent = self._spent()
        if own := spent.get((dataset.name, method.name)):
            return statistics.mean(own)
        spent = {key: v for key, v in spent.items() if key[1] != PROBE}  # it trains nothing
        here = [statistics.mean(v) for (name, _), v in spent.items() if name == dataset.name]
        usual = statistics.median(here) if here else dataset.seconds
        ratios = [
            statistics.mean(v) / statistics.median(
                statistics.mean(w) for (other, _), w in spent.items() if other == name
            )
            for (name, row), v in spent.items()
            if row == method.name
        ]  # fmt: skip
        return usual * (statistics.median(ratios) if ratios else method.times)

    def _spent(self) -> dict[tuple[str, str], list[float]]:
        found: dict[tuple[str, str], list[float]] = {}
        for path, result in self._read.items():
            name = path.parts[-3]
            if seconds := result.get("time", {}).get("processor_seconds"):
                found.setdefault((name, result["run"]["method"]), []).append(seconds)
        return found

    def costs(self) -> list[tuple[str, str, int, float]]:
        """Return data set, method, cells still to run (grids that do not move), core-seconds."""
        found: dict[tuple[str, str], int] = {}
        for dataset, method in self.work:
            choice = self.choice(dataset, method)
            left = len(self.seeds_of(method)) - len(self.results_of(dataset, method))
            if choice.missing and not method.rates_of:
                left += len(choice.missing)
            found[dataset.name, method.name] = left
        return [
            (name, row, left, left * self.seconds(self.datasets[name], self.methods[row]))
            for (name, row), left in found.items()
            if left
        ]

    # -- work

    def complete(
        self, say: Callable[[str], None], *, minutes: float | None = None, jobs: int = 1
    ) -> bool:
        """Run missing cells, and begin none after so many minutes.

        A cell that fails is told, and left out of this call: the others are run.

        Returns:
            Whether all are done.
        """
        until = None if minutes is None else time.monotonic() + 60 * minutes
        run, failed = self.run or run_cell, set[Path]()
        running: dict[Future[Result], Cell] = {}
        with _Here() if jobs == 1 else _processes(jobs) as pool:
            while True:
                left_out = {cell.path for cell in running.values()} | failed
                late = until is not None and time.monotonic() > until
                for cell in [] if late else self.runnable():
                    if len(running) < jobs and cell.path not in left_out:
                        running[pool.submit(run, cell)] = cell
                if not running:
                    return not self.runnable()
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    cell = running.pop(future)
                    name = "/".join((*cell.path.parts[-3:-1], cell.path.stem))
                    try:
                        result = future.result()
                    except FedpetError as error:
                        failed.add(cell.path)
                        say(f"{name} failed: {error}")
                        continue
                    cell.write(result)
                    say(f"{name}: {cell.show(result)}")

    def check(self, count: int, say: Callable[[str], None]) -> bool:
        """Run a random sample of finished cells again; note it in RESULTS/checks.json."""
        run = self.run or run_cell
        return check(self.finished(), count, self.results / "checks.json", say, run=run)


@dataclass(frozen=True)
class _Structure(StructureFile):
    """Search a structure on the rows of a data set's folder, which its file does not name."""

    folder: Path | None = None

    def run(self) -> Result:
        cell = SuiteCell(
            self.path, None, self.seed, None, self.experiment, "", FEDPET, folder=self.folder
        )
        found = StructureFile.run(replace(self, experiment=cell.located()))["structure"]
        about = {**found.provenance["data"], "source": self.experiment.data.source}
        found = replace(found, provenance={**found.provenance, "data": about})
        atomic_write(self.path, found.to_json().encode())
        return {"structure": found}


class _Here(Executor):
    """Run what is submitted at once, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except FedpetError as error:
            future.set_exception(error)
        return future


def _processes(jobs: int) -> Executor:
    return ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))


def run_cell(cell: Cell) -> Result:
    """Run a cell; the work of a process of the pool."""
    return cell.run()
