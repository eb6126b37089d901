"""Read an experiment, a field a stage, and check what stages ask of each other.

In:  a TOML file with a table a stage, `--set stage.key=value`, or Flower's flat run config
     (`stage-key`).
Out: an `Experiment`. Deeper code takes the stage's dataclass and never sees a string key.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedpet.config.parsing import field_types, read_stage, refuse_unknown, with_overrides
from fedpet.config.ranges import kebab_case
from fedpet.config.renamed import refuse_former_names
from fedpet.config.schema import (
    TASKS,
    BackboneConfig,
    ClientsConfig,
    CodecConfig,
    DataConfig,
    MaskConfig,
    RunConfig,
    SearchConfig,
    StructureConfig,
    TrainingConfig,
)
from fedpet.config.strategy_registry import (
    StrategyConfig,
    UnregisteredStrategy,
    registered_rules,
    rule_of_table,
)
from fedpet.errors import ConfigError
from fedpet.utils.paths import absolute, expand

Scalar = str | int | float | bool

_PATHS = (
    *(("run", "cache"), ("run", "out"), ("run", "start")),
    *(("structure", "file"), ("clients", "script")),
)
_PATHS_OR_NAMES = (("backbone", "model"), ("data", "source"))  # a name, where no file is there


def located(tables: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return an experiment's tables with absolute paths."""
    found = {stage: dict(table) for stage, table in tables.items()}
    for (stage, key), value in _local_paths(tables):
        found[stage][key] = str(absolute(value))
    return found


def _local_paths(
    tables: Mapping[str, Mapping[str, Any]],
) -> Iterator[tuple[tuple[str, str], str]]:
    """Yield the keys whose value is a path on this machine, and the path."""
    for stage, key in (*_PATHS, *_PATHS_OR_NAMES):
        value = tables.get(stage, {}).get(key)
        if value and ((stage, key) in _PATHS or _is_path(value)):
            yield (stage, key), value


def _is_path(value: str) -> bool:
    """Return True for a file, and for what cannot be a name."""
    if value == "bundled" or value.startswith("package:"):
        return False
    return value.startswith((".", "~", "/")) or os.path.exists(expand(value))


def _read_toml(path: str | Path) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"there is no experiment file {str(path)!r}.") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{str(path)!r} is not a readable TOML file: {error}.") from None


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that decides a run, a field a stage."""

    run: RunConfig = field(default_factory=RunConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    clients: ClientsConfig = field(default_factory=ClientsConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    structure: StructureConfig = field(default_factory=StructureConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)

    def __post_init__(self) -> None:
        strategy, training = self.strategy.with_training(self.training)
        object.__setattr__(self, "strategy", strategy)
        object.__setattr__(self, "training", training)
        self._check_search()
        if self.data.eval_on == "clients" and not self.clients.eval_fraction:
            raise ConfigError(
                "data.eval-on = 'clients' measures on rows that the clients hold out, and "
                "clients.eval-fraction is 0: give a fraction, 0.2 say."
            )
        kind = importlib.import_module(TASKS).kind_of(self.data.task)
        kind.check_experiment(self)
        measure = self.clients.eval_fraction or self.clients.unseen_fraction
        if measure and self.data.metric in kind.written_metrics:
            raise ConfigError(
                f"clients measure data.metric on rows of their own, and {self.data.metric!r} is "
                f"taken of texts that the server's model writes: take one of "
                f"{', '.join(kind.metrics)}, and name {self.data.metric!r} in data.metrics."
            )
        if len(self.mask.tiers) > 1 and self.strategy.compares_replies:
            rules = registered_rules().items()
            means = ", ".join(name for name, rule in rules if not rule.compares_replies)
            raise ConfigError(
                f"strategy {self.strategy.name!r} compares whole replies, and clients of several "
                f"mask.tiers send different entries: take one that averages ({means}), or one tier."
            )

    def _check_search(self) -> None:
        if not self.search.federated:
            return
        if self.run.start:
            raise ConfigError(
                "search.federated finds the structure in the run, and run.start names values of a "
                "structure that is settled: leave one of them out."
            )
        if self.structure.file:
            raise ConfigError(
                f"search.federated finds the structure in the run, and structure.file names "
                f"{self.structure.file!r}: leave one of them out."
            )
        if self.strategy.compares_replies:
            raise ConfigError(
                f"search.federated averages what clients send, and strategy {self.strategy.name!r} "
                "is there since a mean can be led astray by one of them: search beforehand with "
                "`fedpet search --federated` and another strategy, or name a structure.file."
            )

    @classmethod
    def from_tables(
        cls, tables: Mapping[str, Any], *, strategy: StrategyConfig | None = None
    ) -> Experiment:
        """Build from nested tables with kebab-case or snake_case keys.

        Args:
            tables: A table a stage.
            strategy: An object of `fedpet.strategies`, which stands for the table [strategy].

        Raises:
            ConfigError: An unknown table or key (the known ones are named), or a bad value.
        """
        stages = field_types(cls)
        refuse_former_names(tables)
        refuse_unknown("table", tables, stages)
        built: dict[str, Any] = {}
        for name, table in tables.items():
            if name == "strategy" and strategy is not None:
                continue
            if not isinstance(table, Mapping):
                raise ConfigError(f"{name!r} must be a table of keys, got {table!r}.")
            stage = stages[name]
            if name == "strategy":
                stage, table = rule_of_table(table)
            built[name] = read_stage(stage, name, table)
        return cls(**built) if strategy is None else cls(**built, strategy=strategy)

    @classmethod
    def of_run(cls, folder: Path) -> Experiment:
        """Read the experiment of a finished run, whose rule need not be registered here."""
        path = folder / "config.toml"
        table = _read_toml(path).get("strategy", {})
        if not isinstance(table, dict) or table.get("name", "fedavg") in registered_rules():
            return cls.from_file(path)
        known = kebab_case(StrategyConfig.__dataclass_fields__)
        common = {key: value for key, value in table.items() if key in known}
        rule = read_stage(UnregisteredStrategy, "strategy", common)
        return cls.from_tables(_read_toml(path), strategy=rule)

    @classmethod
    def from_file(cls, path: str | Path, overrides: Iterable[str] = ()) -> Experiment:
        """Read a TOML file, and name the run by the file's stem where nothing names it.

        Args:
            path: The file.
            overrides: `stage.key=value` strings; the last one wins.
        """
        tables = _read_toml(path)
        experiment = cls.from_tables(with_overrides(tables, overrides, field_types(cls)))
        if experiment.run.name == RunConfig.name:
            run = replace(experiment.run, name=Path(path).stem)
            experiment = replace(experiment, run=run)
        return experiment

    @classmethod
    def from_run_config(cls, run_config: Mapping[str, Scalar]) -> Experiment:
        """Build from Flower's flat, kebab-case run config: `mask-density` is `mask.density`."""
        tables: dict[str, dict[str, Any]] = {}
        for key, value in run_config.items():
            stage, _, name = key.partition("-")
            tables.setdefault(stage, {})[name] = value
        return cls.from_tables(tables)

    def located(self) -> Experiment:
        """Return the same with absolute paths; relative ones start at the current directory."""
        tables = located(self.to_tables())
        stages = {
            name: read_stage(type(config), name, tables[name])
            for name, config in vars(self).items()
            if name != "strategy"  # an object of the user's own has no table
        }
        return dataclasses.replace(self, **stages)

    def relative_paths(self) -> Iterator[tuple[str, str]]:
        """Yield the keys and values of relative paths."""
        tables = self.to_tables()
        for key, value in _local_paths(tables):
            if not expand(value).is_absolute():
                yield ".".join(key), value

    def to_tables(self) -> dict[str, dict[str, Any]]:
        """Return nested tables with kebab-case keys, as `from_tables` takes them."""
        return {stage: config.to_table() for stage, config in vars(self).items()}

    def to_run_config(self) -> dict[str, Scalar]:
        """Return Flower's flat form; a list becomes one string, its entries joined by commas."""
        return {
            f"{stage}-{key}": ",".join(value) if isinstance(value, list) else value
            for stage, table in self.to_tables().items()
            for key, value in table.items()
        }
