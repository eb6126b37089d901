"""The table of federated search: bytes, quality, and how much of the structure is the central one.

    table file -> [structures] -> [tune: rates] -> [final: seeds] -> table

In:  a TOML file: an experiment with its search, a grid of rates, splits, seeds.
Out: `RESULTS/structures/*.json`, `RESULTS/{tune,final}/NAME.json`, and `RESULTS/checks.json`.

Three methods train on the same clients and rounds, under one budget of values:

    federated   the clients search and then train, in one run; both are paid for in bytes
    central     the structure of a search on all clients' rows together; its search sends nothing
    random      structures drawn under the budget, several a seed

Each search and each draw has the seed of its run. Rates are settled once for each method, on rows
and with a seed that no result is reported on. A cell is a run of fedpet in a process of its own.
"""

from __future__ import annotations

import statistics
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from fedpet.config import Experiment
from fedpet.errors import ConfigError
from fedpet.search import deciding
from fedpet.simulations.central_search import search_centrally
from fedpet.simulations.search_progress import SearchProgress
from fedpet.structure import Structure
from fedpet.units import show_bytes

from .cells import ROOT, Work
from .table.cell import fingerprint, read_cell, run_in_process, write_cell
from .table.file import FEDPET, Cell, Keys, Method, Rate, experiment_file

__all__ = ["METHODS", "PHASES", "FederatedSearchRun", "FederatedSearchTable", "run_cell"]

PHASES = ("structures", "tune", "final")
METHODS = ("federated", "central", "random")
_SETTLED = ("budget", "rate", "rates", "mask_in_budget")  # of a search, filled in when it begins
Run = Callable[[Cell, Path], dict[str, Any]]


@dataclass(frozen=True)
class FederatedSearchTable:
    """What a table file says.

    Attributes:
        experiment: The file of the experiment.
        overrides: For all methods and phases.
        rates: Each method's grid.
        results: Folder of the cells.
        tune_split: Rows to settle rates on.
        tune_seed: Of all that is run for that.
        final_split: Rows to report on.
        seeds: Of the reported runs.
        random_structures: Drawn for each seed.
        timeout_seconds: A cell that takes longer is ended, and the table with it.
    """

    experiment: Path
    overrides: tuple[str, ...]
    rates: tuple[Rate, ...]
    results: Path
    tune_split: str
    tune_seed: int
    final_split: str
    seeds: tuple[int, ...]
    random_structures: int
    timeout_seconds: float

    @classmethod
    def read(cls, path: Path) -> FederatedSearchTable:
        """Read and check a table file.

        Raises:
            ConfigError: Unknown or missing keys, or rates that would be settled on results.
        """
        try:
            tables = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"there is no table file {str(path)!r}.") from None
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{str(path)!r} is not a readable TOML file: {error}.") from None
        top = Keys("the table file", tables)
        tune, final = (Keys(f"[{name}]", top.take(name, dict)) for name in ("tune", "final"))
        named = top.take("experiment", str)
        read = cls(
            experiment=path.parent / named if named.endswith(".toml") else experiment_file(named),
            overrides=tuple(top.take("set", list, [])),
            rates=tuple(
                Rate.parse(rate, "learning-rates") for rate in top.take("learning-rates", list)
            ),
            results=path.parent / top.take("results", str, f"results/{path.stem}"),
            tune_split=tune.take("split", str),
            tune_seed=tune.take("seed", int),
            final_split=final.take("split", str),
            seeds=tuple(final.take("seeds", list)),
            random_structures=final.take("random-structures", int),
            timeout_seconds=float(top.take("cell-timeout-seconds", int, 7200)),
        )
        for keys in (top, tune, final):
            keys.refuse_others()
        if read.tune_split == read.final_split or read.tune_seed in read.seeds:
            raise ConfigError(
                f"rates must be settled on rows and by a seed that no result is reported on, got "
                f"the splits {read.tune_split!r} and {read.final_split!r}, and seed "
                f"{read.tune_seed} beside {list(read.seeds)}."
            )
        if not (read.rates and read.seeds and read.random_structures > 0):
            raise ConfigError("a table needs learning-rates, seeds and random-structures.")
        return read

    def searching(self, method: str, seed: int, draw: int = 0) -> Experiment:
        """The experiment as one method's search reads it.

        Args:
            method: Of `METHODS`.
            seed: Of the run.
            draw: Which of a seed's random structures.
        """
        how = {
            "federated": ("search.federated=true", f"search.seed={seed}"),
            "central": (f"search.seed={seed}",),
            "random": ("search.method=random", f"search.seed={1000 * seed + draw}"),
        }[method]
        return Experiment.from_file(self.experiment, (*self.overrides, *how))

    def structure_file(self, method: str, seed: int, draw: int = 0) -> Path:
        """Where a structure that is made before the runs lies."""
        name = f"{method}{draw}" if method == "random" else method
        return self.results / "structures" / f"{name}-seed{seed}.json"

    def cell(
        self, phase: str, method: str, rate: Rate, seed: int, split: str, draw: int = 0
    ) -> Cell:
        """One run."""
        experiment = self.searching(method, seed, draw)
        if method != "federated":
            file = _from_root(self.structure_file(method, seed, draw))
            structure = replace(experiment.structure, file=file)
            experiment = replace(experiment, structure=structure)
        rounds = experiment.strategy.num_rounds
        experiment = replace(
            experiment,
            run=replace(experiment.run, seed=seed),
            data=replace(experiment.data, eval_split=split),
            training=replace(
                experiment.training, learning_rate=rate.learning_rate, learning_rates=rate.by_kind
            ),
            strategy=replace(experiment.strategy, evaluate_every=rounds),
        )
        what = f"{method}{draw}" if method == "random" else method
        of = f"lr{str(rate).replace(' ', '-').replace('=', '')}" if phase == "tune" else ""
        name = f"{what}-{of or f'seed{seed}'}"
        path = self.results / phase / f"{name}.json"
        return Cell(path, Method(what, FEDPET, self.overrides, self.rates), rate, experiment)


@dataclass
class FederatedSearchRun:
    """Runs what is missing of a table, and says how it goes.

    Args:
        table: What to run.
        say: Shows one line.
        run: Runs one cell in a folder; by default in a process of its own.
    """

    table: FederatedSearchTable
    say: Callable[[str], None]
    run: Run | None = None

    def complete(self, phases: Iterable[str] = PHASES) -> None:
        """Run what is missing of the phases, in their order."""
        for phase in PHASES:
            if phase not in phases:
                continue
            if phase == "structures":
                for wanted in self.wanted():
                    self.find(*wanted)
            else:
                self._work.complete(list(self.cells(phase)))

    def check(self, count: int, phases: Iterable[str] = PHASES) -> bool:
        """Run a random sample of the finished cells again; True where all are the same."""
        cells = [
            cell for phase in ("tune", "final") if phase in phases for cell in self.known(phase)
        ]
        return self._work.check(cells, count, self.table.results / "checks.json")

    # -- structures

    def wanted(self) -> Iterator[tuple[str, int, int]]:
        """(method, seed, draw) of each structure that is made before the runs."""
        table = self.table
        yield ("central", table.tune_seed, 0)
        yield ("random", table.tune_seed, 0)
        for seed in table.seeds:
            yield ("central", seed, 0)
            yield from (("random", seed, draw) for draw in range(table.random_structures))

    def find(self, method: str, seed: int, draw: int) -> Structure:
        """Make a structure, or read the one that is there.

        Raises:
            ConfigError: The one there was made with other settings.
        """
        experiment = self.table.searching(method, seed, draw)
        path = self.table.structure_file(method, seed, draw)
        if not path.exists():
            self.say(f"structures/{path.stem} ...")
            path.parent.mkdir(parents=True, exist_ok=True)
            with SearchProgress() as progress:
                return search_centrally(experiment, path, progress)
        structure = Structure.from_json(path.read_text(encoding="utf-8"))
        told, config = structure.provenance, experiment.search
        settings = told.get("settings")
        if settings is None:  # of a random one
            same = (told.get("seed"), told.get("asked_budget")) == (config.seed, config.budget)
        else:
            wanted = {**deciding(config), "asked_budget": config.budget}
            before = {**settings, "asked_budget": told.get("asked_budget")}
            same = all(before.get(key) == wanted[key] for key in wanted if key not in _SETTLED)
        if not same:
            raise ConfigError(
                f"{str(path)!r} was made with other settings: remove it to make it again, or name "
                "another folder with the table file's key 'results'."
            )
        return structure

    # -- cells

    def cells(self, phase: str) -> Iterator[Cell]:
        """The cells of a phase.

        Raises:
            ConfigError: An earlier phase is not finished.
        """
        table = self.table
        for method in METHODS:
            if phase == "tune":
                yield from self.tune_cells(method)
                continue
            rate = self.settled(method)
            draws = range(table.random_structures) if method == "random" else (0,)
            for seed in table.seeds:
                for draw in draws:
                    yield table.cell("final", method, rate, seed, table.final_split, draw)

    def known(self, phase: str) -> list[Cell]:
        """The cells of a phase, as far as earlier phases tell them."""
        try:
            return list(self.cells(phase))
        except ConfigError:
            return []

    def tune_cells(self, method: str) -> list[Cell]:
        """A cell a rate, evaluated on the tuning split."""
        table = self.table
        return [
            table.cell("tune", method, rate, table.tune_seed, table.tune_split)
            for rate in sorted(table.rates)
        ]

    def settled(self, method: str) -> Rate:
        """The rate of the highest metric; of equals the smaller one.

        Raises:
            ConfigError: A cell of the grid has not been run, or learned nothing at any rate.
        """
        scores = {}
        for cell in self.tune_cells(method):
            result = read_cell(cell)
            if result is None:
                raise ConfigError(
                    f"the rate of {method!r} is not settled: {cell.name} has not been run. Run the "
                    "phase 'tune' first."
                )
            if result["run"]["status"] == "ok":
                scores[cell.rate] = float(result["quality"]["final"])
        if not scores:
            raise ConfigError(f"{method!r} learned nothing at any rate of its grid: lower them.")
        return min(scores, key=lambda rate: (-scores[rate], rate))

    # -- what came out

    def final_table(self) -> Table:
        """Mean and deviation over the seeds, bytes by kind, a row a method."""
        shown = Table(title="mean over seeds, deviation over seeds", title_justify="left", box=None)
        for head in ("structure", "metric", "", "values", "search", "training", "rate"):
            shown.add_column(head, justify="left" if head in ("structure", "") else "right")
        for row in self.summary():
            shown.add_row(
                row["method"],
                f"{row['mean']:.4f}",
                f"± {row['deviation']:.4f}",
                f"{row['values']:,.0f}",
                show_bytes(row["search_bytes"]) if row["search_bytes"] else "",
                show_bytes(row["training_bytes"]),
                row["rate"],
            )
        return shown

    def summary(self) -> list[dict[str, Any]]:
        """A row for each method whose final cells are all there; random ones first averaged."""
        rows = []
        for method in METHODS:
            cells = [c for c in self.known("final") if c.method.name.rstrip("0123456789") == method]
            results = [(cell.experiment.run.seed, read_cell(cell)) for cell in cells]
            done = [(seed, result) for seed, result in results if result is not None]
            if not done or len(done) < len(results):
                continue
            by_seed = [
                statistics.mean(r["quality"]["final"] for s, r in done if s == seed)
                for seed in self.table.seeds
            ]
            search = [_bytes_of(r, "search") for _, r in done]
            rows.append(
                {
                    "method": method,
                    "mean": statistics.mean(by_seed),
                    "deviation": statistics.stdev(by_seed) if len(by_seed) > 1 else 0.0,
                    "by_seed": by_seed,
                    "values": statistics.mean(r["model"]["structure_values"] for _, r in done),
                    "search_bytes": statistics.mean(search),
                    "training_bytes": statistics.mean(_bytes_of(r, "training") for _, r in done),
                    "rate": str(cells[0].rate),
                }
            )
        return rows

    def overlaps(self) -> list[tuple[str, float]]:
        """How alike the structures are: mean Jaccard index over modules, by what is compared."""
        sets: dict[str, dict[int, list[set[tuple[str, str]]]]] = {m: {} for m in METHODS}
        for cell in self.known("final"):
            result = read_cell(cell)
            if result is not None and "modules" in result:
                method = cell.method.name.rstrip("0123456789")
                modules = {(kind, target) for kind, target in result["modules"]}
                sets[method].setdefault(cell.experiment.run.seed, []).append(modules)
        found: list[tuple[str, float]] = []
        for index, one in enumerate(METHODS):
            for other in METHODS[index:]:
                pairs = [
                    _jaccard(a, b)
                    for first, these in sets[one].items()
                    for second, those in sets[other].items()
                    # Of one method those of different seeds; of two those of one seed.
                    if (first < second if one == other else first == second)
                    for a in these
                    for b in those
                ]
                if pairs:
                    what = f"{one}, seeds" if one == other else f"{one} and {other}"
                    found.append((what, statistics.mean(pairs)))
        return found

    @property
    def _work(self) -> Work[Cell]:
        return Work(
            read=read_cell,
            run=self._run,
            write=write_cell,
            show=_show,
            fingerprint=_fingerprint,
            say=self.say,
        )

    def _run(self, cell: Cell) -> dict[str, Any]:
        if cell.experiment.structure.file and not (ROOT / cell.experiment.structure.file).exists():
            raise ConfigError(
                f"{cell.name} trains the structure {cell.experiment.structure.file!r}, which has "
                "not been made. Run the phase 'structures' first."
            )
        with tempfile.TemporaryDirectory(prefix="fedpet-cell-") as folder:
            if self.run is not None:
                return self.run(cell, Path(folder))
            return run_cell(cell, Path(folder), self.table.timeout_seconds)


def run_cell(cell: Cell, folder: Path, timeout_seconds: float) -> dict[str, Any]:
    """Run a cell in a process of its own; its structure's modules are told beside its result."""
    result = run_in_process(cell, folder, timeout_seconds)
    text = (folder / "run" / "structure.json").read_text(encoding="utf-8")
    structure = Structure.from_json(text)
    modules = [[spec.kind, spec.target] for spec in structure.modules]
    told = {"modules": modules, "search": structure.provenance.get("search")}
    return {**result, **told}


def _from_root(path: Path) -> str:
    """A file as a cell names it: below the checkout, from where the table is run."""
    whole = path.resolve()
    return str(whole.relative_to(ROOT) if whole.is_relative_to(ROOT) else whole)


def _bytes_of(result: dict[str, Any], kind: str) -> int:
    sent = result["communication"]
    if "by_kind" in sent:
        return int(sent["by_kind"][kind]["total_bytes"])
    return int(sent["total_bytes"]) if kind == "training" else 0


def _fingerprint(result: dict[str, Any]) -> dict[str, Any]:
    return {**fingerprint(result), "modules": result["modules"]}


def _show(result: dict[str, Any]) -> str:
    sent: Sequence[str] = [
        f"{kind} {show_bytes(_bytes_of(result, kind))}"
        for kind in ("search", "training")
        if _bytes_of(result, kind)
    ]
    return f"{result['quality']['metric']} {result['quality']['final']:.4f}, {', '.join(sent)}"


def _jaccard(one: set[Any], other: set[Any]) -> float:
    return len(one & other) / max(1, len(one | other))
