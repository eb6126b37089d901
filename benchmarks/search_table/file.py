"""What a table file of searched structures says.

In:  a TOML file.
Out: a `SearchTable`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.table.file import Rate
from benchmarks.table.keys import Keys, read_keys
from fedpet.config import BackboneConfig, Experiment, SearchConfig, TrainingConfig
from fedpet.errors import ConfigError


@dataclass(frozen=True)
class Dataset:
    """A folder of split files below the folder of the data sets."""

    name: str
    metric: str
    eval_splits: tuple[str, ...]  # reported on, together
    text_columns: tuple[str, ...] = ("text",)
    logit_adjustment: float = 0.0  # of every loss, a search's and training's; 1 counters skew


@dataclass(frozen=True)
class SearchTable:
    """What a table file says.

    Attributes:
        results: Folder of the cells.
        datasets: By name, in the file's order.
        budgets: Of a structure, as `search.budget`.
        train_rows: Trained and searched on, of each data set's training split.
        tune_rows: Others of the training split, for settling rates and the manual choice.
        tune_seed: Of all that is run for that.
        rates: Each method's grid.
        presets: The manual structures to choose from.
        seeds: Of the reported runs.
        random_structures: Drawn for each seed.
        search: How structures are searched.
        variants: The same with some settings changed, a row of its own each, by name.
        training: How all structures are trained.
        max_length: Tokens a row.
        backbone: Which model.
    """

    results: Path
    datasets: tuple[Dataset, ...]
    budgets: tuple[str | int | float, ...]
    train_rows: int
    tune_rows: int
    tune_seed: int
    rates: tuple[Rate, ...]
    presets: tuple[str, ...]
    seeds: tuple[int, ...]
    random_structures: int
    search: SearchConfig
    variants: Mapping[str, SearchConfig]
    training: TrainingConfig
    max_length: int
    backbone: BackboneConfig

    @classmethod
    def read(cls, path: Path) -> SearchTable:
        """Read and check a table file.

        Raises:
            ConfigError: Unknown or missing keys, or a table that would compare unlike with unlike.
        """
        top, (tune, final) = read_keys(path, "tune", "final")
        stages = {name: top.take(name, dict, {}) for name in ("search", "training", "backbone")}
        experiment = Experiment.from_tables(stages)
        variants = {
            name: Experiment.from_tables({"search": {**stages["search"], **changes}}).search
            for name, changes in top.take("variants", dict, {}).items()
        }
        read = cls(
            results=path.parent / top.take("results", str, f"results/{path.stem}"),
            datasets=tuple(
                _dataset(name, table) for name, table in top.take("datasets", dict).items()
            ),
            budgets=tuple(top.take("budgets", list)),
            train_rows=top.take("train-rows", int),
            max_length=top.take("max-length", int, 64),
            tune_rows=tune.take("rows", int),
            tune_seed=tune.take("seed", int),
            rates=tuple(
                Rate.parse(rate, "[tune] learning-rates")
                for rate in tune.take("learning-rates", list)
            ),
            presets=tuple(tune.take("presets", list)),
            seeds=tuple(final.take("seeds", list)),
            random_structures=final.take("random-structures", int),
            search=experiment.search,
            variants=variants,
            training=experiment.training,
            backbone=experiment.backbone,
        )
        for keys in (top, tune, final):
            keys.refuse_others()
        if read.tune_seed in read.seeds:
            raise ConfigError(
                f"tune.seed {read.tune_seed} is one of final.seeds: rates must be settled by runs "
                "that no result is reported of."
            )
        if read.training.logit_adjustment:
            raise ConfigError(
                "a search and its training have one loss: give logit-adjustment in "
                "[datasets.NAME], not in [training]."
            )
        if not (read.datasets and read.budgets and read.rates and read.presets and read.seeds):
            raise ConfigError(
                "a table of structures needs datasets, budgets, learning-rates, presets and seeds."
            )
        return read

    def training_at(self, rate: Rate) -> TrainingConfig:
        """The training settings with a point of the grid."""
        return replace(self.training, learning_rate=rate.learning_rate, learning_rates=rate.by_kind)


def _dataset(name: str, table: Any) -> Dataset:
    where = f"[datasets.{name}]"
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where} must be a table of keys, got {table!r}.")
    keys = Keys(where, table)
    found = Dataset(
        name,
        keys.take("metric", str),
        tuple(keys.take("eval-splits", list)),
        tuple(keys.take("text-columns", list, ["text"])),
        keys.take("logit-adjustment", float, 0.0),
    )
    keys.refuse_others()
    return found
