"""Work off a table: make structures, choose learning rates, run the reported cells.

    table file -> [structures] -> [tune: methods x rates] -> best rates -> [final: methods x seeds]

A table is a product of places (data set and budget, or one place), methods, and rates or seeds.
Rates are chosen for each place and method on rows and with a seed that no result is reported on;
all methods have grids of one size. A cell leaves RESULTS/PHASE/NAME.json. `experiment_grid` and
`central_grid` say what one cell runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cell import Cell, Run, check, complete
from benchmarks.rate import Rate
from fedpet.errors import ConfigError

PHASES = ("structures", "tune", "final")


class UnsettledError(ConfigError):
    """Raised where the rate of a method is not chosen yet."""


@dataclass(frozen=True)
class Method:
    """Describe a row of a table.

    Attributes:
        name: Of the row.
        rates: The grid; () takes the rate of others.
        rates_of: The methods whose best rate it takes; () for its own.
        overrides: Of the experiment.
        runs: "fedpet", or the name of a baseline.
        structure: "searched" or "drawn" before the runs; "" for neither.
        draws: Structures for each seed.
    """

    name: str
    rates: tuple[Rate, ...] = ()
    rates_of: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    runs: str = "fedpet"
    structure: str = ""
    draws: int = 1


@dataclass
class Grid(ABC):
    """Lay out a table's cells, and work them off.

    Attributes:
        results: Folder of the cells.
        methods: Reported rows, in the file's order.
        tuned: Methods whose rates are chosen.
        tune_seed: Of all tuning runs.
        seeds: A reported run each.
        say: Prints one line.
        run: Runs one cell; None for `Cell.run`.
        jobs: Cells at once.
        only: Names of the methods that are asked for; () for all.
    """

    results: Path
    methods: tuple[Method, ...]
    tuned: tuple[Method, ...]
    tune_seed: int
    seeds: tuple[int, ...]
    say: Callable[[str], None] = print
    run: Run | None = None
    jobs: int = 1
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        known = [method.name for method in self.methods]
        for name in self.only:
            if name not in known:
                raise ConfigError(f"unknown method {name!r}. The table's are: {', '.join(known)}.")
        if not self.methods:
            raise ConfigError("a table needs methods: write a [methods.NAME] for each.")
        if not self.seeds or not all(isinstance(seed, int) for seed in self.seeds):
            raise ConfigError(f"final.seeds must be whole numbers, got {list(self.seeds)}.")
        if self.tune_seed in self.seeds:
            raise ConfigError(
                f"tune.seed {self.tune_seed} is one of final.seeds: rates must be chosen by runs "
                "that no result is reported of."
            )
        tuned = {method.name for method in self.tuned}
        for method in self.methods:
            if unknown := set(method.rates_of) - tuned:
                raise ConfigError(
                    f"{method.name!r} takes the rate of {unknown.pop()!r}, which has no rates of "
                    f"its own. Known are: {', '.join(sorted(tuned))}."
                )
        sizes = {method.name: len(method.rates) for method in self.tuned}
        if len(set(sizes.values())) > 1 or 0 in sizes.values():
            raise ConfigError(
                f"all methods must be tuned over grids of the same size, got {sizes}: give each "
                "the same number of learning-rates."
            )

    @property
    def places(self) -> Sequence[Any]:
        """Return the places at which every method is tuned and run: one for experiments."""
        return (None,)

    @abstractmethod
    def structure_cells(self, place: Any) -> Iterator[Cell]:
        """Yield the cells that make a structure."""

    @abstractmethod
    def tune_cell(self, place: Any, method: Method, rate: Rate) -> Cell:
        """Return the cell of one rate."""

    @abstractmethod
    def seed_cells(self, place: Any, method: Method, how: str, rate: Rate, seed: int) -> list[Cell]:
        """Return the reported cells of one seed: one for each of its structures.

        Args:
            place: Of `places`.
            method: The row.
            how: The method whose rate is taken.
            rate: The chosen one.
            seed: Of the runs.
        """

    # -- cells of a phase

    def chosen(self, methods: Iterable[Method]) -> list[Method]:
        """Return the methods that are asked for, with those whose rates they take."""
        wanted = set(self.only)
        for method in self.methods:
            if method.name in self.only:
                wanted |= set(method.rates_of)
        return [method for method in methods if not self.only or method.name in wanted]

    def tune_cells(self, method: Method, place: Any = None) -> list[Cell]:
        """Return a cell a rate, in rising order; none where there is one rate and no choice."""
        others = [other for other in self.methods if method.name in other.rates_of]
        if len(method.rates) == 1 and not any(len(other.rates_of) > 1 for other in others):
            return []
        return [self.tune_cell(place, method, rate) for rate in method.rates]

    def settled(self, method: Method, place: Any = None) -> tuple[str, Rate]:
        """Return the method and the rate of the best metric; of equals the smaller rate.

        Raises:
            UnsettledError: A cell has not been run, or learned nothing at any rate.
        """
        names = method.rates_of or (method.name,)
        by_name = {tuned.name: tuned for tuned in self.tuned}
        scores: dict[tuple[str, Rate], float] = {}
        missing: list[str] = []
        for name in names:
            tuned = by_name[name]
            if len(names) == len(tuned.rates) == 1:
                return name, tuned.rates[0]
            for rate, cell in zip(tuned.rates, self.tune_cells(tuned, place), strict=True):
                result = cell.read()
                if result is None:
                    missing.append(cell.name)
                elif (score := cell.score(result)) is not None:
                    scores[name, rate] = score if cell.greater_is_better else -score
        if missing:
            raise UnsettledError(
                f"the rate of {method.name!r} is not settled: {', '.join(missing)} have not been "
                "run. Run the phase 'tune' first."
            )
        if not scores:
            raise UnsettledError(
                f"{method.name!r} learned nothing at any rate of its grid: lower its rates."
            )
        return min(scores, key=lambda key: (-scores[key], key[1], names.index(key[0])))

    def final_cells(self, method: Method, place: Any = None) -> list[Cell]:
        """Return the reported cells of a method, by seed.

        Raises:
            UnsettledError: Its rate is not chosen yet.
        """
        how, rate = self.settled(method, place)
        return [
            cell for seed in self.seeds for cell in self.seed_cells(place, method, how, rate, seed)
        ]

    def cells(self, phase: str) -> Iterator[Cell]:
        """Yield the cells of a phase.

        Raises:
            UnsettledError: An earlier phase is not finished.
        """
        for place in self.places:
            if phase == "structures":
                yield from self.structure_cells(place)
            elif phase == "tune":
                for method in self.chosen(self.tuned):
                    yield from self.tune_cells(method, place)
            else:
                for method in self.chosen(self.methods):
                    yield from self.final_cells(method, place)

    def known_cells(self, phase: str) -> list[Cell]:
        """Return the cells of a phase as far as the rates are chosen."""
        if phase != "final":
            return list(self.cells(phase))
        found: list[Cell] = []
        for place in self.places:
            for method in self.chosen(self.methods):
                try:
                    found += self.final_cells(method, place)
                except UnsettledError:
                    continue
        return found

    # -- work

    def complete(self, phases: Iterable[str] = PHASES) -> None:
        """Run what is missing of the phases, in their order."""
        for phase in PHASES:
            if phase in phases:
                complete(list(self.cells(phase)), self.say, jobs=self.jobs, run=self.run)

    def check(self, count: int, phases: Iterable[str] = PHASES) -> bool:
        """Run a random sample of the finished cells again; note it in RESULTS/checks.json.

        Returns:
            Whether all are the same to the bit.
        """
        cells = [cell for phase in PHASES if phase in phases for cell in self.known_cells(phase)]
        return check(cells, count, self.results / "checks.json", self.say, run=self.run)
