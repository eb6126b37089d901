"""What a table file says: an experiment, methods with their grids, splits, seeds.

In:  a TOML file.
Out: a `TableFile`, and the cells that it asks for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.baselines import METHODS
from benchmarks.table.keys import Keys, read_keys, strings
from fedpet.config import Experiment
from fedpet.config.builtin import experiment_file
from fedpet.errors import ConfigError

FEDPET = "fedpet"
# Stages that a baseline does not read, and keys that decide where a run is done and not what.
_FEDPET_STAGES = ("mask", "structure", "search", "codec")
_PLACE_KEYS = ("name", "workers", "cache", "out")


@dataclass(frozen=True, order=True)
class Rate:
    """One point of a grid: a learning rate, and those of kinds of module that differ from it.

    Written `0.001`, or `"0.001 head=0.01"`. Sorts by size.
    """

    learning_rate: float
    by_kind: tuple[str, ...] = ()

    @classmethod
    def parse(cls, value: Any, where: str) -> Rate:
        """Read a number or a string.

        Raises:
            ConfigError: It is neither, or the rate is not above 0.
        """
        first, *others = str(value).split() or [""]
        try:
            rate = float(first)
        except ValueError:
            rate = 0.0
        if not rate > 0 or isinstance(value, bool) or not all("=" in other for other in others):
            raise ConfigError(
                f"{where} must hold learning rates such as 0.001 or '0.001 head=0.01', got "
                f"{value!r}."
            )
        return cls(rate, tuple(others))

    def __str__(self) -> str:
        return " ".join((f"{self.learning_rate:g}", *self.by_kind))


@dataclass(frozen=True)
class Method:
    """A row of the table: what runs, with which overrides, over which rates."""

    name: str
    runs: str  # "fedpet", or a baseline's name
    overrides: tuple[str, ...]
    rates: tuple[Rate, ...]


@dataclass(frozen=True)
class Cell:
    """One run: everything that decides it, and the file it leaves.

    `experiment` is fully resolved; `path` is RESULTS/PHASE/NAME.json.
    """

    path: Path
    method: Method
    rate: Rate
    experiment: Experiment

    @property
    def name(self) -> str:
        """PHASE/NAME, as people see it."""
        return f"{self.path.parent.name}/{self.path.stem}"

    def settings(self) -> dict[str, dict[str, Any]]:
        """The tables of the experiment that decide this cell's outcome."""
        tables = self.experiment.to_tables()
        for key in _PLACE_KEYS:
            del tables["run"][key]
        if self.method.runs != FEDPET:
            for stage in _FEDPET_STAGES:
                del tables[stage]
        return tables


@dataclass(frozen=True)
class TableFile:
    """What a table file says.

    Attributes:
        experiment: The file of the experiment that all methods run.
        overrides: For all methods and phases.
        methods: Rows, in the file's order.
        results: Folder of the cells.
        tune_split: Rows to tune on. No result is reported on them.
        tune_seed: Of all tuning runs.
        final_split: Rows to report on.
        final_seeds: A run each.
        timeout_seconds: A cell that takes longer is ended, and the table with it.
    """

    experiment: Path
    overrides: tuple[str, ...]
    methods: tuple[Method, ...]
    results: Path
    tune_split: str
    tune_seed: int
    final_split: str
    final_seeds: tuple[int, ...]
    timeout_seconds: float

    @classmethod
    def read(cls, path: Path) -> TableFile:
        """Read and check a table file.

        Raises:
            ConfigError: Unknown or missing keys, grids of different sizes, one split for both.
        """
        top, (tune, final) = read_keys(path, "tune", "final")
        methods = tuple(_method(name, table) for name, table in top.take("methods", dict).items())
        read = cls(
            experiment=experiment_file(top.take("experiment", str), path.parent),
            overrides=strings(top.take("set", list, []), "set"),
            methods=methods,
            results=path.parent / top.take("results", str, f"results/{path.stem}"),
            tune_split=tune.take("split", str),
            tune_seed=tune.take("seed", int),
            final_split=final.take("split", str),
            final_seeds=tuple(final.take("seeds", list)),
            timeout_seconds=float(top.take("cell-timeout-seconds", int, 7200)),
        )
        for keys in (top, tune, final):
            keys.refuse_others()
        read.check()
        return read

    def check(self) -> None:
        """Refuse a table that would compare unlike with unlike."""
        if not self.methods:
            raise ConfigError("a table needs methods: write a [methods.NAME] for each.")
        sizes = {method.name: len(method.rates) for method in self.methods}
        if len(set(sizes.values())) > 1:
            raise ConfigError(
                f"all methods must be tuned over grids of the same size, got {sizes}: give each "
                "the same number of learning-rates."
            )
        if self.tune_split == self.final_split:
            raise ConfigError(
                f"tune.split and final.split are both {self.tune_split!r}: rates must be chosen "
                "on rows that no result is reported on."
            )
        if not self.final_seeds or not all(isinstance(seed, int) for seed in self.final_seeds):
            raise ConfigError(f"final.seeds must be whole numbers, got {list(self.final_seeds)}.")

    def tune_cells(self, method: Method) -> list[Cell]:
        """A cell a rate, in rising order; none where there is one rate and so nothing to choose.

        Evaluated before the first round and after the last.
        """
        if len(method.rates) == 1:
            return []
        rounds = self._experiment(method, method.rates[0]).strategy.num_rounds
        more = (
            f"data.eval-split={json.dumps(self.tune_split)}",
            f"run.seed={self.tune_seed}",
            f"strategy.evaluate-every={rounds}",
        )
        return [
            self._cell("tune", f"{method.name}-lr{_file_name(rate)}", method, rate, more)
            for rate in sorted(method.rates)
        ]

    def final_cells(self, method: Method, rate: Rate) -> list[Cell]:
        """A cell a seed."""
        split = f"data.eval-split={json.dumps(self.final_split)}"
        return [
            self._cell(
                "final", f"{method.name}-seed{seed}", method, rate, (split, f"run.seed={seed}")
            )
            for seed in self.final_seeds
        ]

    def _cell(self, phase: str, name: str, method: Method, rate: Rate, more: Sequence[str]) -> Cell:
        experiment = self._experiment(method, rate, more)
        return Cell(self.results / phase / f"{name}.json", method, rate, experiment)

    def _experiment(self, method: Method, rate: Rate, more: Sequence[str] = ()) -> Experiment:
        rates = [f"training.learning-rate={rate.learning_rate!r}"]
        if rate.by_kind:
            rates.append(f"training.learning-rates={json.dumps(list(rate.by_kind))}")
        return Experiment.from_file(
            self.experiment, (*self.overrides, *method.overrides, *rates, *more)
        )


def _method(name: str, table: Any) -> Method:
    where = f"[methods.{name}]"
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where} must be a table of keys, got {table!r}.")
    keys = Keys(where, table)
    runs = keys.take("runs", str, name)
    if runs not in (FEDPET, *METHODS):
        raise ConfigError(
            f"{where} runs {runs!r}. Known are: {', '.join((FEDPET, *METHODS))}; name one with "
            "runs where the row has a name of its own."
        )
    rates = tuple(
        Rate.parse(value, f"{where} learning-rates") for value in keys.take("learning-rates", list)
    )
    overrides = strings(keys.take("set", list, []), f"{where} set")
    keys.refuse_others()
    if not rates or len(set(rates)) < len(rates):
        raise ConfigError(f"{where} learning-rates must be distinct, and one at least.")
    if "/" in name or name.startswith("."):
        raise ConfigError(f"{where}: a method's name becomes a file's; leave '/' out.")
    return Method(name, runs, overrides, rates)


def _file_name(rate: Rate) -> str:
    return str(rate).replace(" ", "-").replace("=", "")
