"""Read a table of searched structures: beside random and manual ones under the same budget.

Training is central: one model, some thousand rows. For each data set and budget, in values of the
backbone with the head not counted, these are trained from scratch and evaluated:

    searched   the structure that a search with this seed finds on the training rows
    VARIANT    the same of a search with other settings, at the rate chosen for "searched"
    random     structures drawn under the budget, several a seed
    manual     of the presets put under the budget, the one that is best on the tuning rows
    transfer   the structure that a search with this seed finds on the other data set

The structures that a rate is chosen with are another search's, or another draw.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.cell import Cell, Result
from benchmarks.central_training import Rows, run_centrally
from benchmarks.grid import Grid, Method
from benchmarks.rate import Rate
from benchmarks.stored_settings import with_new_fields
from benchmarks.table_keys import Keys, rates_of
from fedpet.config import BackboneConfig, Experiment, SearchConfig, TrainingConfig
from fedpet.errors import ConfigError

_DEFAULTS: dict[str, dict[str, Any]] = {
    "backbone": asdict(BackboneConfig()),
    "rows": {"logit_adjustment": 0.0},
    "search": asdict(SearchConfig()),
    "training": asdict(TrainingConfig()),
}


@dataclass(frozen=True)
class CentralCell(Cell):
    """Search a structure, or train one.

    Attributes:
        backbone: The checkpoint.
        rows: Which rows of which data set.
        search: Of the structure; its method is "s3pet", "random", or presets.
        training: None where the structure itself is the result.
        data: Folder of the data sets.
        cache: For tokenised rows.
    """

    backbone: BackboneConfig
    rows: Rows
    search: SearchConfig
    training: TrainingConfig | None
    data: Path
    cache: Path

    def settings(self) -> dict[str, Any]:
        """Return what decides the outcome."""
        found: dict[str, Any] = {
            "backbone": asdict(self.backbone),
            "rows": asdict(self.rows),
            "search": asdict(self.search),
            "training": None
            if self.training is None
            else {**asdict(self.training), "schedule": self.training.schedule_in_force},
            "seed": self.seed,
            "found_by": None if self.needs is None else self.needs.stem,
        }
        plain: dict[str, Any] = json.loads(json.dumps(found))
        return plain

    def complete_settings(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """Fill in the defaults of each stage."""
        defaults = json.loads(json.dumps(_DEFAULTS))
        return {
            stage: {**defaults.get(stage, {}), **value} if isinstance(value, dict) else value
            for stage, value in with_new_fields(stored).items()
        }

    def run(self) -> Result:
        """Search or train in this process, on one thread."""
        return run_centrally(
            self.backbone,
            self.rows,
            self.search,
            self.training,
            self.seed,
            found_by=self.needs,
            folder=self.data,
            cache=self.cache,
        )

    def score(self, result: Result) -> float | None:
        """Return the metric."""
        return float(result["score"])

    def fingerprint(self, result: Result) -> dict[str, Any]:
        """Return values and metric."""
        return {name: result[name] for name in ("sha256", "score")}


@dataclass(frozen=True)
class Dataset:
    """Describe a folder of split files."""

    name: str
    metric: str
    eval_splits: tuple[str, ...]  # reported on, together
    text_columns: tuple[str, ...] = ("text",)
    logit_adjustment: float = 0.0  # of every loss, a search's and training's; 1 counters skew


@dataclass(frozen=True)
class Place:
    """Name a data set and the budget of a structure on it."""

    dataset: Dataset
    budget: str | int | float


@dataclass
class CentralGrid(Grid):
    """Lay out a table of searched structures.

    Attributes:
        datasets: In the file's order.
        budgets: Of a structure, as `search.budget`.
        train_rows: Trained and searched on, of each data set's training split.
        tune_rows: Others of the training split, for choosing rates and the manual structure.
        random_structures: Drawn for each seed.
        search: How structures are searched.
        variants: The same with some settings changed, by name of their row.
        training: How all structures are trained.
        max_length: Tokens a row.
        backbone: The checkpoint.
        data: Folder of the data sets.
        cache: For tokenised rows.
    """

    datasets: tuple[Dataset, ...] = ()
    budgets: tuple[str | int | float, ...] = ()
    train_rows: int = 0
    tune_rows: int = 0
    random_structures: int = 1
    search: SearchConfig = field(default_factory=SearchConfig)
    variants: Mapping[str, SearchConfig] = field(default_factory=dict)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    max_length: int = 64
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: Path = Path()
    cache: Path = Path()

    @classmethod
    def read(cls, top: Keys, path: Path, **options: Any) -> CentralGrid:
        """Read a table file, of which `options` say how it is worked off.

        Raises:
            ConfigError: Unknown or missing keys, or rates chosen on results.
        """
        tune, final = (Keys(f"[{name}]", top.take(name, dict)) for name in ("tune", "final"))
        stages = {name: top.take(name, dict, {}) for name in ("search", "training", "backbone")}
        experiment = Experiment.from_tables(stages)
        variants = {
            name: Experiment.from_tables({"search": {**stages["search"], **changes}}).search
            for name, changes in top.take("variants", dict, {}).items()
        }
        rates, presets = rates_of(tune, "[tune]"), tuple(tune.take("presets", list))
        searched, random = Method("searched", rates), Method("random", rates)
        grid = cls(
            results=path.parent / top.take("results", str, f"results/{path.stem}"),
            methods=(
                searched,
                *(Method(name, rates_of=("searched",)) for name in variants),
                random,
                Method("manual", rates_of=presets),
                Method("transfer", rates_of=("searched",)),
            ),
            tuned=(searched, random, *(Method(name, rates) for name in presets)),
            tune_seed=tune.take("seed", int),
            seeds=tuple(final.take("seeds", list)),
            datasets=tuple(
                _dataset(name, table) for name, table in top.take("datasets", dict).items()
            ),
            budgets=tuple(top.take("budgets", list)),
            train_rows=top.take("train-rows", int),
            max_length=top.take("max-length", int, 64),
            tune_rows=tune.take("rows", int),
            random_structures=final.take("random-structures", int),
            search=experiment.search,
            variants=variants,
            training=experiment.training,
            backbone=experiment.backbone,
            **options,
        )
        for keys in (top, tune, final):
            keys.refuse_others()
        if grid.training.logit_adjustment:
            raise ConfigError(
                "a search and its training have one loss: give logit-adjustment in "
                "[datasets.NAME], not in [training]."
            )
        if not (grid.datasets and grid.budgets and presets):
            raise ConfigError("a table of structures needs datasets, budgets and presets.")
        return grid

    @property
    def places(self) -> Sequence[Place]:
        """Return every data set under every budget."""
        return [Place(dataset, budget) for dataset in self.datasets for budget in self.budgets]

    def structure_cells(self, place: Place) -> Iterator[Cell]:
        """Yield the searches of all seeds, and of the variants."""
        for seed in (self.tune_seed, *self.seeds):
            yield self.structure_cell(place, seed)
        for variant in self.variants:
            for seed in self.seeds:
                yield self.structure_cell(place, seed, variant)

    def structure_cell(self, place: Place, seed: int, variant: str = "searched") -> Cell:
        """Return the search of one seed."""
        search = self.variants.get(variant, self.search)
        search = replace(search, method="s3pet", budget=place.budget, seed=seed)
        of = "" if variant == "searched" else f"{variant}-"
        path = self._path("structures", place, f"{of}seed{seed}")
        # Its settings hold seed 0: of a training, and there is none.
        return self._cell(path, place, search, None, 0, None, eval_splits=())

    def tune_cell(self, place: Place, method: Method, rate: Rate) -> Cell:
        """Return the training of "searched", "random" or a preset, evaluated on the tuning rows."""
        path = self._path("tune", place, f"{method.name}-lr{rate.file_name}")
        return self._trained(path, place, method.name, rate, self.tune_seed, self.tune_seed)

    def seed_cells(
        self, place: Place, method: Method, how: str, rate: Rate, seed: int
    ) -> list[Cell]:
        """Return the trainings of one seed: of each random structure, of each other data set."""
        name = method.name
        if name == "transfer":
            others = [d for d in self.datasets if d.name != place.dataset.name]
            return [
                self._trained(
                    self._path("final", place, f"from-{other.name}-seed{seed}"),
                    place,
                    "searched",
                    rate,
                    seed,
                    source=other,
                )
                for other in others
            ]
        if name == "random":
            return [
                self._trained(
                    self._path("final", place, f"random{draw}-seed{seed}"),
                    place,
                    name,
                    rate,
                    seed,
                    draw,
                )
                for draw in range(self.random_structures)
            ]
        path = self._path("final", place, f"{name}-seed{seed}")
        return [self._trained(path, place, how if name == "manual" else name, rate, seed)]

    def _trained(
        self,
        path: Path,
        place: Place,
        method: str,
        rate: Rate,
        seed: int,
        draw: int = 0,
        source: Dataset | None = None,
    ) -> Cell:
        search = replace(self.search, method=method, budget=place.budget, seed=0)
        needs = None
        if method in ("searched", *self.variants):
            found = self.structure_cell(Place(source or place.dataset, place.budget), seed, method)
            assert isinstance(found, CentralCell)
            search, needs = found.search, found.path
        elif method == "random":
            search = replace(search, seed=1000 * seed + draw)
        splits = () if path.parent.name == "tune" else place.dataset.eval_splits
        return self._cell(path, place, search, rate, seed, needs, eval_splits=splits)

    def _cell(
        self,
        path: Path,
        place: Place,
        search: SearchConfig,
        rate: Rate | None,
        seed: int,
        needs: Path | None,
        *,
        eval_splits: tuple[str, ...],
    ) -> Cell:
        dataset = place.dataset
        rows = Rows(
            dataset=dataset.name,
            metric=dataset.metric,
            text_columns=dataset.text_columns,
            max_length=self.max_length,
            train_rows=self.train_rows,
            held_rows=0 if eval_splits else self.tune_rows,
            eval_splits=eval_splits,
            logit_adjustment=dataset.logit_adjustment,
        )
        training = None
        if rate is not None:
            training = replace(
                self.training, learning_rate=rate.learning_rate, learning_rates=rate.by_kind
            )
        where = (self.backbone, rows, search, training, self.data, self.cache)
        return CentralCell(path, rate, seed, needs, *where)

    def _path(self, phase: str, place: Place, name: str) -> Path:
        file = f"{place.dataset.name}-b{place.budget}-{name}.json"
        return self.results / phase / file


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
