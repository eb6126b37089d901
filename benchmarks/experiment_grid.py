"""Read a table of federated runs: methods, each an experiment with overrides or a baseline.

    experiment = "film-reviews"      # all methods run it
    set = ["strategy.num-rounds=12"] # for all methods
    learning-rates = [0.01, 0.03]    # for methods without a grid of their own
    [tune]                           # split, seed
    [final]                          # split, seeds
    [methods.NAME]
    runs = "fedpet"                  # or a baseline; NAME where it is left out
    set = ["search.seed={seed}"]     # {seed} of the run; {draw}: 1000 * seed + number
    rates-of = "OTHER"               # take that method's rate
    structure = "drawn"              # or "searched": made before the runs, as by `fedpet search`
    draws = 2                        # numbered structures for each seed
    in-process = true                # without Ray: the same values, and no workers to start

A cell is a run in a process of its own, or in this one; its file holds the run's `result.json`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w

from benchmarks.baselines import METHODS
from benchmarks.cell import ROOT, Cell, Result
from benchmarks.grid import Grid, Method
from benchmarks.rate import Rate
from benchmarks.stored_settings import stored_experiment
from benchmarks.structure_file import StructureFile
from benchmarks.table_keys import Keys, rates_of, strings
from fedpet.config import Experiment
from fedpet.config.builtin import experiment_file
from fedpet.errors import ConfigError, RunError
from fedpet.pet.structure import Structure
from fedpet.report.number_format import show_metric
from fedpet.utils.formatting import format_bytes

FEDPET = "fedpet"
# Stages that a baseline does not read, and keys that no outcome depends on.
_FEDPET_STAGES = ("mask", "structure", "search", "codec")
_PLACE_KEYS = (
    *("name", "workers", "cache", "out", "callbacks", "save-every", "keep", "sample-prompts"),
)


@dataclass(frozen=True)
class ExperimentCell(Cell):
    """Run one federated experiment.

    Attributes:
        experiment: Fully resolved.
        method: "peft-lora", or "random0": a method with the number of its structure.
        runs: "fedpet", or the name of a baseline.
        timeout_seconds: A run that takes longer is ended.
        in_process: Runs here, one thread, without Ray.
    """

    experiment: Experiment
    method: str
    runs: str
    timeout_seconds: float = 7200
    in_process: bool = False

    def settings(self) -> dict[str, dict[str, Any]]:
        """Return the tables of the experiment that decide the outcome."""
        tables = self.experiment.to_tables()
        tables["training"]["schedule"] = self.experiment.training.schedule_in_force
        for key in _PLACE_KEYS:
            del tables["run"][key]
        if self.runs != FEDPET:
            for stage in _FEDPET_STAGES:
                if not (self.in_process and stage == "codec"):  # there baselines are coded too
                    del tables[stage]
        return tables

    def complete_settings(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """Fill in defaults; a structure is named by its folder and file alone."""
        tables = stored_experiment(stored).to_tables()
        structure = tables["structure"]
        structure["file"] = "/".join(Path(structure["file"]).parts[-2:])
        return tables

    def labels(self) -> dict[str, Any]:
        """Return method, kind of run and rate."""
        return {"method": self.method, "runs": self.runs, "learning_rate": str(self.rate)}

    def run(self) -> Result:
        """Run the experiment; its structure's modules go with the result.

        A run that learned nothing is a result too.

        Raises:
            RunError: The run left no result. Its last lines are in the message.
        """
        if self.in_process:
            from benchmarks.one_process import DivergedError, diverged, run_here  # brings torch

            try:
                result = run_here(self.experiment, self.runs)
            except DivergedError as error:
                return diverged(self.method, self.seed, error)
            return {**result, "run": {**result["run"], "method": self.method}}
        with tempfile.TemporaryDirectory(prefix="fedpet-cell-") as folder:
            result = self.run_in(Path(folder))
        return {**result, "run": {**result["run"], "method": self.method}}

    def run_in(self, folder: Path) -> Result:
        """Run the experiment in a process that works in `folder`."""
        out, log = folder / "run", folder / "log.txt"
        settings = replace(self.experiment, run=replace(self.experiment.run, out=""))
        if self.needs is not None:
            structure = replace(settings.structure, file=str(self.needs.resolve()))
            settings = replace(settings, structure=structure)
        (folder / "cell.toml").write_text(tomli_w.dumps(settings.to_tables()), encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks", "run", self.runs]
        command += [str(folder / "cell.toml"), "--out", str(out)]
        path = os.pathsep.join((*filter(None, sys.path), str(ROOT)))
        with log.open("wb") as file:
            try:
                done = subprocess.run(
                    command,
                    stdout=file,
                    stderr=file,
                    env={**os.environ, "PYTHONPATH": path},
                    timeout=self.timeout_seconds,
                )
                how = f"with exit code {done.returncode}"
            except subprocess.TimeoutExpired:
                how = f"by us after {self.timeout_seconds:.0f} seconds"
        if not (out / "result.json").exists():
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-15:]
            raise RunError(
                f"the run of {self.name} ended {how} and left no result. Its last lines:\n"
                + "\n".join(last)
            )
        result: Result = json.loads((out / "result.json").read_text(encoding="utf-8"))
        if self.needs is not None or self.experiment.search.federated:
            found = Structure.from_json((out / "structure.json").read_text(encoding="utf-8"))
            result["modules"] = [[spec.kind, spec.target] for spec in found.modules]
            result["search"] = found.provenance.get("search")
        return result

    def score(self, result: Result) -> float | None:
        """Return the metric at the end."""
        return float(result["quality"]["final"]) if result["run"]["status"] == "ok" else None

    @property
    def greater_is_better(self) -> bool:
        """Tell how scores compare: less is better for a perplexity."""
        from fedpet.training.metrics import greater_is_better  # brings torch

        return greater_is_better(self.experiment.data.metric)

    def fingerprint(self, result: Result) -> dict[str, Any]:
        """Return values, metric and bytes, and the structure's modules; or that it diverged."""
        if "quality" not in result:
            return {"status": result["run"]["status"]}
        found = {
            "final_values_sha256": result["final_values_sha256"],
            "metric": result["quality"]["final"],
            "total_bytes": result["communication"]["total_bytes"],
        }
        return found | {key: result[key] for key in ("modules",) if key in result}

    def show(self, result: Result) -> str:
        """Describe metric, bytes of a search, and a status that is not ok."""
        status = result["run"]["status"]
        if "quality" not in result:
            return str(status)
        quality = result["quality"]
        searched = bytes_of(result, "search")
        parts = [f"{quality['metric']} {show_metric(quality['final'])}"]
        parts += [f"search {format_bytes(searched)}"] * bool(searched)
        return ", ".join(parts if status == "ok" else [*parts, status])


@dataclass
class ExperimentGrid(Grid):
    """Lay out a table of federated runs.

    Attributes:
        experiment: The file of the experiment that all methods run.
        overrides: For all methods and phases.
        tune_split: Rows to choose rates on.
        final_split: Rows to report on.
        timeout_seconds: A cell that takes longer is ended, and the table with it.
        in_process: Cells run in the process that asks for them; no cell has a structure file.
    """

    experiment: Path = Path()
    overrides: tuple[str, ...] = ()
    tune_split: str = ""
    final_split: str = ""
    timeout_seconds: float = 7200
    in_process: bool = False

    @classmethod
    def read(cls, top: Keys, path: Path, **options: Any) -> ExperimentGrid:
        """Read a table file, of which `options` say how it is worked off.

        Raises:
            ConfigError: Unknown or missing keys, grids of different sizes, rates chosen on results.
        """
        tune, final = (Keys(f"[{name}]", top.take(name, dict)) for name in ("tune", "final"))
        shared = rates_of(top, "the table file")
        methods = tuple(
            _method(name, table, shared) for name, table in top.take("methods", dict).items()
        )
        grid = cls(
            results=path.parent / top.take("results", str, f"results/{path.stem}"),
            methods=methods,
            tuned=tuple(method for method in methods if not method.rates_of),
            tune_seed=tune.take("seed", int),
            seeds=tuple(final.take("seeds", list)),
            experiment=experiment_file(top.take("experiment", str), path.parent),
            overrides=strings(top.take("set", list, []), "set"),
            tune_split=tune.take("split", str),
            final_split=final.take("split", str),
            timeout_seconds=float(top.take("cell-timeout-seconds", int, 7200)),
            in_process=top.take("in-process", bool, False),
            **options,
        )
        for keys in (top, tune, final):
            keys.refuse_others()
        if grid.tune_split == grid.final_split:
            raise ConfigError(
                f"tune.split and final.split are both {grid.tune_split!r}: rates must be chosen "
                "on rows that no result is reported on."
            )
        return grid

    def structure_cells(self, place: Any) -> Iterator[Cell]:
        """Yield the files of the structures that are made before the runs."""
        for seed in (self.tune_seed, *self.seeds):
            for method in self.chosen(self.methods):
                if method.structure:
                    for number in range(1 if seed == self.tune_seed else method.draws):
                        path = self._structure_path(method, seed, number)
                        experiment = self._experiment(method, seed, number)
                        yield StructureFile(path, None, seed, None, experiment)

    def tune_cell(self, place: Any, method: Method, rate: Rate) -> Cell:
        """Return the run of one rate, evaluated before the first round and after the last."""
        rounds = self._experiment(method, self.tune_seed, 0).strategy.num_rounds
        more = (_split(self.tune_split), f"strategy.evaluate-every={rounds}")
        name = f"{_label(method, 0)}-lr{rate.file_name}"
        return self._cell("tune", name, method, rate, self.tune_seed, 0, more)

    def seed_cells(self, place: Any, method: Method, how: str, rate: Rate, seed: int) -> list[Cell]:
        """Return the runs of one seed."""
        return [
            self._cell(
                "final",
                f"{_label(method, number)}-seed{seed}",
                method,
                rate,
                seed,
                number,
                (_split(self.final_split),),
            )
            for number in range(method.draws)
        ]

    def _cell(
        self,
        phase: str,
        name: str,
        method: Method,
        rate: Rate,
        seed: int,
        number: int,
        more: Sequence[str],
    ) -> Cell:
        rates = [f"training.learning-rate={rate.learning_rate!r}", f"run.seed={seed}"]
        if rate.by_kind:
            rates.append(f"training.learning-rates={json.dumps(list(rate.by_kind))}")
        experiment = self._experiment(method, seed, number, (*rates, *more))
        needs = self._structure_path(method, seed, number) if method.structure else None
        if needs is not None:
            structure = replace(experiment.structure, file=_from_root(needs))
            experiment = replace(experiment, structure=structure)
        return ExperimentCell(
            self.results / phase / f"{name}.json",
            rate,
            seed,
            needs,
            experiment,
            _label(method, number),
            method.runs,
            self.timeout_seconds,
            self.in_process,
        )

    def _experiment(
        self, method: Method, seed: int, number: int, more: Sequence[str] = ()
    ) -> Experiment:
        own = [
            override.replace("{seed}", str(seed)).replace("{draw}", str(1000 * seed + number))
            for override in method.overrides
        ]
        return Experiment.from_file(self.experiment, (*self.overrides, *own, *more))

    def _structure_path(self, method: Method, seed: int, number: int) -> Path:
        return self.results / "structures" / f"{_label(method, number)}-seed{seed}.json"


def bytes_of(result: Result, kind: str) -> int:
    """Return what a run sent for "search" or for "training"."""
    sent = result["communication"]
    if "by_kind" in sent:
        return int(sent["by_kind"][kind]["total_bytes"])
    return int(sent["total_bytes"]) if kind == "training" else 0


def _method(name: str, table: Any, shared: tuple[Rate, ...]) -> Method:
    where = f"[methods.{name}]"
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where} must be a table of keys, got {table!r}.")
    if "/" in name or name.startswith("."):
        raise ConfigError(f"{where}: a method's name becomes a file's; leave '/' out.")
    keys = Keys(where, table)
    other = keys.take("rates-of", str, "")
    method = Method(
        name=name,
        rates=rates_of(keys, where) or (() if other else shared),
        rates_of=(other,) if other else (),
        overrides=strings(keys.take("set", list, []), f"{where} set"),
        runs=keys.take("runs", str, name),
        structure=keys.take("structure", str, ""),
        draws=keys.take("draws", int, 1),
    )
    keys.refuse_others()
    if method.structure not in ("", "searched", "drawn") or method.draws < 1:
        raise ConfigError(
            f"{where} structure must be 'searched' or 'drawn', and draws at least 1, got "
            f"{method.structure!r} and {method.draws}."
        )
    if method.runs not in (FEDPET, *METHODS):
        raise ConfigError(
            f"{where} runs {method.runs!r}. Known are: {', '.join((FEDPET, *METHODS))}; name one "
            "with runs where the row has a name of its own."
        )
    if method.rates and other:
        raise ConfigError(f"{where} must have learning-rates or rates-of, got both.")
    if not method.rates and not other:
        raise ConfigError(f"{where} lacks the key 'learning-rates', as does the table file.")
    return method


def _label(method: Method, number: int) -> str:
    return f"{method.name}{number}" if method.structure == "drawn" else method.name


def _split(name: str) -> str:
    return f"data.eval-split={json.dumps(name)}"


def _from_root(path: Path) -> str:
    """Return a file's path below the checkout."""
    whole = path.resolve()
    return str(whole.relative_to(ROOT) if whole.is_relative_to(ROOT) else whole)
