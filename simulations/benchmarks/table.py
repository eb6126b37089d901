"""The table of methods: rates tuned on one split, results reported on another, a file a cell.

    table file -> [tune: method x rates] -> best rates -> [final: method x seeds] -> table

In:  a TOML file: an experiment, the methods with their grids, the splits and the seeds.
Out: `RESULTS/{tune,final}/NAME.json`, a cell each, and `RESULTS/checks.json`.

Every method, fedpet's plans among them, has a grid of the same size. A cell is a run in a process
of its own; its file holds the settings that decide it and the run's `result.json`. A cell that is
there is not run again, and one that was run with other settings is refused, never overwritten.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tomli_w

from fedpet.config import Experiment
from fedpet.errors import ConfigError, FedpetError, RunError
from fedpet.simulations.run_folder import machine, versions

from .baselines import METHODS

SCHEMA = 1
FEDPET = "fedpet"
PHASES = ("tune", "final")
ROOT = Path(__file__).resolve().parents[2]
# Stages that a baseline does not read, and keys that decide where a run is done and not what.
_FEDPET_STAGES = ("mask", "structure", "codec")
_PLACE_KEYS = ("name", "workers", "cache", "out")
_CHECKED = ("final_values_sha256", "metric", "total_bytes")

Run = Callable[["Cell", Path], dict[str, Any]]  # runs a cell, working in a folder


# -- the table file ------------------------------------------------------------------------------


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
        try:
            tables = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"there is no table file {str(path)!r}.") from None
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{str(path)!r} is not a readable TOML file: {error}.") from None
        top = _Keys("the table file", tables)
        tune, final = (
            _Keys("[tune]", top.take("tune", dict)),
            _Keys("[final]", top.take("final", dict)),
        )
        methods = tuple(_method(name, table) for name, table in top.take("methods", dict).items())
        read = cls(
            experiment=_experiment_path(top.take("experiment", str), path.parent),
            overrides=_strings(top.take("set", list, []), "set"),
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
        """A cell a rate, in rising order. Evaluated before the first round and after the last."""
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


class _Keys:
    """A table whose keys are taken one by one; what is left at the end is unknown."""

    def __init__(self, where: str, table: Mapping[str, Any]) -> None:
        self._where = where
        self._left = dict(table)
        self._known: list[str] = []

    def take(self, key: str, kind: type, default: Any = None) -> Any:
        self._known.append(key)
        value = self._left.pop(key, default)
        if value is None:
            raise ConfigError(f"{self._where} lacks the key {key!r}.")
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ConfigError(
                f"{self._where}: {key} must be of type {kind.__name__}, got {value!r}."
            )
        return value

    def refuse_others(self) -> None:
        for key in self._left:
            raise ConfigError(
                f"{self._where}: unknown key {key!r}. Known are: {', '.join(self._known)}."
            )


def _method(name: str, table: Any) -> Method:
    where = f"[methods.{name}]"
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where} must be a table of keys, got {table!r}.")
    keys = _Keys(where, table)
    runs = keys.take("runs", str, name)
    if runs not in (FEDPET, *METHODS):
        raise ConfigError(
            f"{where} runs {runs!r}. Known are: {', '.join((FEDPET, *METHODS))}; name one with "
            "runs where the row has a name of its own."
        )
    rates = tuple(
        Rate.parse(value, f"{where} learning-rates") for value in keys.take("learning-rates", list)
    )
    overrides = _strings(keys.take("set", list, []), f"{where} set")
    keys.refuse_others()
    if not rates or len(set(rates)) < len(rates):
        raise ConfigError(f"{where} learning-rates must be distinct, and one at least.")
    if "/" in name or name.startswith("."):
        raise ConfigError(f"{where}: a method's name becomes a file's; leave '/' out.")
    return Method(name, runs, overrides, rates)


def _strings(values: list[Any], where: str) -> tuple[str, ...]:
    if not all(isinstance(value, str) for value in values):
        raise ConfigError(f"{where} must be a list of 'stage.key=value', got {values!r}.")
    return tuple(values)


def _experiment_path(name: str, folder: Path) -> Path:
    """A file beside the table file, or a built-in experiment by its name."""
    return folder / name if name.endswith(".toml") else experiment_file(name)


def experiment_file(name: str) -> Path:
    """A TOML file by its path, or a built-in experiment by its name."""
    if name.endswith(".toml"):
        return Path(name)
    folder = ROOT / "simulations" / "experiments"
    path = folder / f"{name}.toml"
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.toml")))
        raise ConfigError(
            f"there is no built-in experiment {name!r}. Known are: {known}. Another is named by "
            "its .toml file."
        )
    return path


def _file_name(rate: Rate) -> str:
    return str(rate).replace(" ", "-").replace("=", "")


# -- cells on disk -------------------------------------------------------------------------------


def read_cell(cell: Cell) -> dict[str, Any] | None:
    """The result of a finished cell; None where there is none yet.

    Raises:
        ConfigError: The file there is of a run with other settings.
    """
    if not cell.path.exists():
        return None
    try:
        content = json.loads(cell.path.read_text(encoding="utf-8"))
        stored, result = content["settings"], content["result"]
        rate = Rate.parse(content["learning_rate"], "learning_rate")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{str(cell.path)!r} is no cell of a table: {error!r}.") from None
    differing = _differing(stored, cell.settings())
    if content.get("runs") != cell.method.runs:
        differing.append(f"runs was {content.get('runs')!r}, is {cell.method.runs!r}")
    if differing or rate != cell.rate:
        raise ConfigError(
            f"the cell {cell.name} was run with other settings: "
            f"{'; '.join(differing) or 'its rate'}. Remove {str(cell.path)!r} to run it again, or "
            "name another folder with the table file's key 'results'."
        )
    assert isinstance(result, dict)
    return result


def write_cell(cell: Cell, result: dict[str, Any]) -> None:
    """Leave a finished cell, whole or not at all."""
    result = {**result, "run": {**result["run"], "method": cell.method.name}}
    content = {
        "schema": SCHEMA,
        "phase": cell.path.parent.name,
        "method": cell.method.name,
        "runs": cell.method.runs,
        "learning_rate": str(cell.rate),
        "commit": _commit(),
        "settings": cell.settings(),
        "result": result,
    }
    _write_json(cell.path, content)


def _differing(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What tells two settings apart; a key that one lacks has its default there."""
    try:
        before = Experiment.from_tables(stored).to_tables()
    except FedpetError as error:
        return [f"they do not read any more ({error})"]
    after = Experiment.from_tables(wanted).to_tables()
    return [
        f"{stage}.{key} was {before[stage][key]!r}, is {value!r}"
        for stage, table in after.items()
        for key, value in table.items()
        if before[stage][key] != value
    ]


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
    os.chmod(name, 0o644)
    os.replace(name, path)


def _commit() -> str:
    """What the checkout stands at; "-dirty" says that something in it had been changed."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


# -- running them --------------------------------------------------------------------------------


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
    _ran_seconds: list[float] = field(default_factory=list)

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
        self._complete([cell for m in self.methods for cell in self.table.tune_cells(m)])

    def final(self) -> None:
        """Run every method at its best rate, with every seed.

        Raises:
            ConfigError: A method is not tuned yet.
        """
        best = {method.name: self.best_rate(method) for method in self.methods}
        self._complete(
            [cell for m in self.methods for cell in self.table.final_cells(m, best[m.name])]
        )

    def tuned(self, method: Method) -> dict[Rate, float]:
        """Rate -> metric on the tuning split, of the cells that are there, in rising order.

        A run that learned nothing (its loss became infinite, say) is no candidate.
        """
        found = {}
        for cell in self.table.tune_cells(method):
            result = read_cell(cell)
            if result is not None and result["run"]["status"] == "ok":
                found[cell.rate] = float(result["quality"]["final"])
        return found

    def best_rate(self, method: Method) -> Rate:
        """The rate of the highest metric; of equals the smaller one.

        Raises:
            ConfigError: A cell of the grid has not been run.
        """
        missing = [c.name for c in self.table.tune_cells(method) if read_cell(c) is None]
        if missing:
            raise ConfigError(
                f"the rate of {method.name!r} is not settled: {', '.join(missing)} have not been "
                "run. Run the phase 'tune' first."
            )
        tuned = self.tuned(method)
        if not tuned:
            raise ConfigError(
                f"{method.name!r} learned nothing at any rate of its grid: lower its rates."
            )
        return min(tuned, key=lambda rate: (-tuned[rate], rate))

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
        cells = [cell for cell in self._known_cells(phases) if read_cell(cell) is not None]
        if not cells:
            raise ConfigError("there is no finished cell to check.")
        all_same = True
        for cell in random.SystemRandom().sample(cells, min(count, len(cells))):
            before = _fingerprint(read_cell(cell) or {})
            after = _fingerprint(self._run(cell))
            same = before == after
            all_same &= same
            self._note_check(cell, same, before, after)
            self.say(
                f"check {cell.name}: {'the same' if same else f'{before} before, {after} now'}"
            )
        return all_same

    def _known_cells(self, phases: Iterable[str]) -> list[Cell]:
        cells = [c for m in self.methods for c in self.table.tune_cells(m) if "tune" in phases]
        if "final" in phases:
            for method in self.methods:
                if len(self.tuned(method)) and all(map(read_cell, self.table.tune_cells(method))):
                    cells += self.table.final_cells(method, self.best_rate(method))
        return cells

    def _note_check(
        self, cell: Cell, same: bool, before: dict[str, Any], after: dict[str, Any]
    ) -> None:
        path = self.table.results / "checks.json"
        checks = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        checks.append(
            {
                "cell": cell.name,
                "date": time.strftime("%Y-%m-%d", time.gmtime()),
                "same": same,
                "before": before,
                "after": after,
                "commit": _commit(),
                "versions": versions(),
                "machine": machine(),
            }
        )
        _write_json(path, checks)

    def _complete(self, cells: Sequence[Cell]) -> None:
        # All files are looked at before the first run: a changed setting is told at once.
        missing = [cell for cell in cells if read_cell(cell) is None]
        if len(missing) < len(cells):
            self.say(f"{len(cells) - len(missing)} of {len(cells)} cells are there already")
        for number, cell in enumerate(missing, 1):
            self.say(f"[{number}/{len(missing)}] {cell.name} ...{self._time_left(missing, number)}")
            started = time.perf_counter()
            result = self._run(cell)
            write_cell(cell, result)
            self._ran_seconds.append(time.perf_counter() - started)
            metric, final = result["quality"]["metric"], result["quality"]["final"]
            self.say(
                f"[{number}/{len(missing)}] {cell.name}: {metric} {final:.4f}, "
                f"{self._ran_seconds[-1]:.0f} s"
                + ("" if result["run"]["status"] == "ok" else f", {result['run']['status']}")
            )

    def _time_left(self, missing: Sequence[Cell], number: int) -> str:
        if not self._ran_seconds:
            return ""
        mean = sum(self._ran_seconds) / len(self._ran_seconds)
        return f" about {mean * (len(missing) - number + 1) / 60:.0f} min left"

    def _run(self, cell: Cell) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="fedpet-cell-") as folder:
            if self.run is not None:
                return self.run(cell, Path(folder))
            return run_in_process(cell, Path(folder), self.table.timeout_seconds)


def run_in_process(cell: Cell, folder: Path, timeout_seconds: float) -> dict[str, Any]:
    """Run a cell by this package's own command line, in a process that ends with it.

    A run that learned nothing is a result too, and is returned as one.

    Raises:
        RunError: The run left no result. Its last lines are in the message.
    """
    out = folder / "run"
    settings = replace(cell.experiment, run=replace(cell.experiment.run, out=""))
    (folder / "cell.toml").write_text(tomli_w.dumps(settings.to_tables()), encoding="utf-8")
    command = [sys.executable, "-m", "simulations.benchmarks", "run", cell.method.runs]
    command += [str(folder / "cell.toml"), "--out", str(out)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((*filter(None, sys.path), str(ROOT))),
    }
    log = folder / "log.txt"
    with log.open("wb") as file:
        try:
            done = subprocess.run(
                command, stdout=file, stderr=file, env=environment, timeout=timeout_seconds
            )
            how = f"with exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            how = f"by us after {timeout_seconds:.0f} seconds"
    if not (out / "result.json").exists():
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-15:]
        raise RunError(
            f"the run of {cell.name} ended {how} and left no result. Its last lines:\n"
            + "\n".join(last)
        )
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert isinstance(result, dict)
    return result


def _fingerprint(result: Mapping[str, Any]) -> dict[str, Any]:
    """What has to come out again, to the bit."""
    found = (
        result["final_values_sha256"],
        result["quality"]["final"],
        result["communication"]["total_bytes"],
    )
    return dict(zip(_CHECKED, found, strict=True))
