"""Works the table of federated search off: structures, then rates, then the reported runs.

In:  a `FederatedSearchTable`.
Out: its structures and cells, each a file, and `checks.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cells import ROOT, Work, with_new_fields
from benchmarks.federated_search.file import FederatedSearchTable
from benchmarks.table.cell import Run, fingerprint, run_in_process, work_of
from benchmarks.table.file import Cell, Rate
from benchmarks.table.running import best_rate
from fedpet.errors import ConfigError
from fedpet.pet.structure import Structure
from fedpet.run.central_search import search_centrally
from fedpet.run.progress import SearchBar
from fedpet.search import reproducible_settings
from fedpet.utils.formatting import format_bytes

PHASES = ("structures", "tune", "final")
METHODS = ("federated", "central", "random")
_SETTLED = (
    "budget",
    "learning_rate",
    "learning_rates",
    "mask_in_budget",
)  # of a search, filled in when it begins


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
            with SearchBar() as progress:
                return search_centrally(experiment, path, progress)
        structure = Structure.from_json(path.read_text(encoding="utf-8"))
        told, config = structure.provenance, experiment.search
        settings = told.get("settings")
        if settings is None:  # of a random one
            same = (told.get("seed"), told.get("asked_budget")) == (config.seed, config.budget)
        else:
            wanted = {**reproducible_settings(config), "asked_budget": config.budget}
            before = {
                **with_new_fields("search", settings),
                "asked_budget": told.get("asked_budget"),
            }
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
        if phase == "tune":
            for method in ("central", "random"):
                yield from self.tune_cells(method)
            return
        for method in METHODS:
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

        A structure that clients searched takes the rate of a centrally searched one: a search
        for each rate would cost more than all else, and would favour it.

        Raises:
            ConfigError: A cell of the grid has not been run, or learned nothing at any rate.
        """
        tuned = "central" if method == "federated" else method
        return best_rate(tuned, self.tune_cells(tuned))

    @property
    def _work(self) -> Work[Cell]:
        return work_of(self._run, self.say, _show, _fingerprint)

    def _run(self, cell: Cell, folder: Path) -> dict[str, Any]:
        if cell.experiment.structure.file and not (ROOT / cell.experiment.structure.file).exists():
            raise ConfigError(
                f"{cell.name} trains the structure {cell.experiment.structure.file!r}, which has "
                "not been made. Run the phase 'structures' first."
            )
        if self.run is not None:
            return self.run(cell, folder)
        return run_cell(cell, folder, self.table.timeout_seconds)


def run_cell(cell: Cell, folder: Path, timeout_seconds: float) -> dict[str, Any]:
    """Run a cell in a process of its own; its structure's modules are told beside its result."""
    result = run_in_process(cell, folder, timeout_seconds)
    text = (folder / "run" / "structure.json").read_text(encoding="utf-8")
    structure = Structure.from_json(text)
    modules = [[spec.kind, spec.target] for spec in structure.modules]
    told = {"modules": modules, "search": structure.provenance.get("search")}
    return {**result, **told}


def bytes_of(result: dict[str, Any], kind: str) -> int:
    """What a run sent for "search" or for "training"."""
    sent = result["communication"]
    if "by_kind" in sent:
        return int(sent["by_kind"][kind]["total_bytes"])
    return int(sent["total_bytes"]) if kind == "training" else 0


def _fingerprint(result: dict[str, Any]) -> dict[str, Any]:
    return {**fingerprint(result), "modules": result["modules"]}


def _show(result: dict[str, Any]) -> str:
    sent: Sequence[str] = [
        f"{kind} {format_bytes(bytes_of(result, kind))}"
        for kind in ("search", "training")
        if bytes_of(result, kind)
    ]
    return f"{result['quality']['metric']} {result['quality']['final']:.4f}, {', '.join(sent)}"
