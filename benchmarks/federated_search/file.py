"""What a table file of federated search says.

In:  a TOML file.
Out: a `FederatedSearchTable`, and the experiments and cells that it asks for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.cells import ROOT
from benchmarks.table.file import FEDPET, Cell, Method, Rate
from benchmarks.table.keys import read_keys, strings
from fedpet.config import Experiment
from fedpet.config.builtin import experiment_file
from fedpet.errors import ConfigError


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
        top, (tune, final) = read_keys(path, "tune", "final")
        read = cls(
            experiment=experiment_file(top.take("experiment", str), path.parent),
            overrides=strings(top.take("set", list, []), "set"),
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


def _from_root(path: Path) -> str:
    """A file as a cell names it: below the checkout, from where the table is run."""
    whole = path.resolve()
    return str(whole.relative_to(ROOT) if whole.is_relative_to(ROOT) else whole)
