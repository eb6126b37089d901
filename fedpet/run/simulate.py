"""Run a federation from Python: objects, names or an experiment file in, a `Run` out.

Objects are written to the cache under the hash of their content, and the experiment names them
there: the same job by an experiment file gives the same values, and any run folder can be resumed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpet.client.node_config import make_cache
from fedpet.config import Experiment, StrategyConfig
from fedpet.config.builtin import load_experiment
from fedpet.config.parsing import field_types, refuse_unknown
from fedpet.data.collator import COLLATORS, Collator
from fedpet.data.federated_dataset import FederatedDataset, load_federated_dataset
from fedpet.errors import ConfigError
from fedpet.pet.structure import Structure
from fedpet.run import ray_engine
from fedpet.run.callbacks import Callback
from fedpet.run.finished import Run
from fedpet.run.model_input import Check, read_model, structure_table
from fedpet.run.progress import Progress
from fedpet.run.resume import read_cut_short
from fedpet.run.trackers import callbacks_of

if TYPE_CHECKING:
    from fedpet.pet.pet_config import PetConfig

__all__ = ["resume", "simulate"]

Tables = dict[str, dict[str, Any]]


def simulate(
    model: Any,
    data: Any = None,
    *,
    strategy: Any = None,
    num_rounds: int | None = None,
    callbacks: Iterable[Callback | str] = (),
    data_collator: str | Collator = "",
    pet_config: PetConfig | None = None,
    out: str | Path = "",
    backend: str = "ray",
    progress: bool = True,
    **settings: Any,
) -> Run:
    """Fine-tune a model over simulated clients.

    Args:
        model: What `get_pet_model` gives, trained or not; a transformers model that classifies
            sequences; or a checkpoint's name (a folder, a hub name, "bundled"). It stays as it is.
            Without `data` (or with a dict for it): an experiment file, a built-in one's name, or
            an `Experiment`.
        data: What `load_federated_dataset` gives or takes as its first argument.
        strategy: An object of `fedpet.strategies`, which stands for the whole table [strategy]; or
            a name ("fedadam"), or a dict of keys.
        num_rounds: Of training: `strategy.num-rounds`.
        callbacks: Objects of subclasses of `Callback`, or names of trackers ("tensorboard").
        data_collator: Makes every batch, as `Trainer`'s does: what `register_data_collator` has
            given a name, the name itself, or its import path: `data.collator`.
        pet_config: What trains of a model that `get_pet_model` has not adapted.
        out: The run folder; "" takes the next free runs/NAME-N.
        backend: "ray" for Ray's workers, or "in-process" for one client after another in this
            process, as a debugger likes it. The values are the same.
        progress: Show how far the run is: a bar in a terminal or a notebook, else lines.
        settings: The other stages of an experiment by name, each a dict of its keys or its
            dataclass: training={"learning_rate": 0.01, "batch_size": 8},
            codec={"uplink": "dither-3"}, run={"seed": 1}. The page of settings lists them; an
            unknown one is refused.

    Returns:
        The run: metrics, history, ledger, model and folder.

    Raises:
        InputError: The model, the data or a setting cannot be used.
        RunError: Nothing was learned.
        RunInterrupted: It was stopped; the message says how to resume it.

    Example:
        >>> rows = bundled_reviews()["train"].select(range(100))
        >>> data = load_federated_dataset(rows, client_column="film")
        >>> run = simulate(bundled_model(), data, num_rounds=1, training={"batch_size": 4},
        ...                backend="in-process", progress=False)
        >>> [row["round"] for row in run.history], run.ledger.ratio_to_dense < 0.01
        ([0, 1], True)
    """
    names = field_types(Experiment)
    refuse_unknown("keyword", settings, [name for name in names if name != "data"])
    given = {
        name: _table(name, names[name], value)
        for name, value in settings.items()
        if not isinstance(value, Structure)
    }
    if strategy is None and isinstance(model, Experiment):
        strategy = model.strategy
    if not isinstance(strategy, StrategyConfig):
        given["strategy"] = _strategy_table(strategy, num_rounds)
    if out:
        given.setdefault("run", {})["out"] = str(out)
    objects = [one for one in _listed(callbacks) if not isinstance(one, str)]
    if trackers := [one for one in _listed(callbacks) if isinstance(one, str)]:
        by_settings = given.setdefault("run", {}).get("callbacks", ())
        given["run"]["callbacks"] = list(dict.fromkeys([*_listed(by_settings), *trackers]))

    check: Check | None = None
    if _is_experiment(model, data):
        if pet_config is not None:
            raise ConfigError("pet_config goes with a model, and an experiment was given.")
        base = model if isinstance(model, Experiment) else load_experiment(str(model))
        if strategy is None:
            strategy = base.strategy
        tables = base.to_tables()
        if isinstance(strategy, StrategyConfig):
            del tables["strategy"]
        if data is not None:
            given["data"] = _table("data", names["data"], data)
    else:
        cache = make_cache(Experiment.from_tables({"run": _cache_key(given)}))
        rows = data if isinstance(data, FederatedDataset) else load_federated_dataset(data)
        tables = {"run": {"name": "simulation"}}
        tables = _laid_over(tables, rows.tables(cache))
        from_model = read_model(model, pet_config, rows.tokenizer, cache)
        _refuse_twice(from_model.tables, given)
        tables, check = _laid_over(tables, from_model.tables), from_model.check
    if data_collator:
        given.setdefault("data", {})["collator"] = COLLATORS.name_of(data_collator)
    if isinstance(structure := settings.get("structure"), Structure):
        cache = make_cache(Experiment.from_tables({"run": _cache_key(given)}))
        given["structure"] = structure_table(structure, cache)
    rule = strategy if isinstance(strategy, StrategyConfig) else None
    if rule is not None and num_rounds is not None:
        rule = replace(rule, num_rounds=num_rounds)
    experiment = Experiment.from_tables(_laid_over(tables, given), strategy=rule)
    with ExitStack() as shown:
        bars = [shown.enter_context(Progress.of(experiment))] if progress else []
        every = callbacks_of([*bars, *objects, *experiment.run.callbacks])
        _, folder = ray_engine.simulate(experiment, every, backend=backend, check=check)
    return Run(folder.path)


def resume(
    folder: str | Path,
    *,
    callbacks: Iterable[Callback | str] = (),
    strategy: Any = None,
    backend: str = "ray",
    progress: bool = True,
) -> Run:
    """Go on with a run that was stopped, from its last round; its values are the same.

    Args:
        folder: The run folder; everything else is read from it.
        callbacks: As in `simulate`, beside the trackers that the run began with.
        strategy: Again the object that the run began with, where it wraps a class of your own.
        backend: As in `simulate`; it may be another than the run began with.
        progress: Show how far the run is.

    Raises:
        InputError: The folder holds no such run, or model, rows or packages are others now.
        RunError: Nothing was learned.
        RunInterrupted: It was stopped once more.

    Example:
        >>> resume("runs/nothing-of-the-kind")
        Traceback (most recent call last):
        fedpet.errors.ConfigError: 'runs/nothing-of-the-kind' is no run folder: config.toml is \
absent. A run that was stopped before it left one has nothing to resume: start it again.
    """
    folder = Path(folder)
    experiment = read_cut_short(folder, strategy)
    with ExitStack() as shown:
        bars = [shown.enter_context(Progress.of(experiment))] if progress else []
        every = callbacks_of([*bars, *_listed(callbacks), *experiment.run.callbacks])
        ray_engine.resume(folder, every, backend=backend, strategy=strategy)
    return Run(folder)


def _is_experiment(model: Any, data: Any) -> bool:
    """Tell an experiment, with at most keys of [data] beside it, from a model and rows."""
    if isinstance(model, Experiment):
        return True
    if not isinstance(model, str | Path):
        if data is None:
            raise ConfigError(
                "simulate needs rows beside a model: give what load_federated_dataset returns."
            )
        return False
    return data is None or (
        isinstance(data, Mapping)
        and all(isinstance(v, str | int | float | list | tuple) for v in data.values())
    )


def _table(stage: str, config: type, value: Any) -> dict[str, Any]:
    """Return the keys of a stage, in snake_case."""
    if is_dataclass(config) and isinstance(value, config):
        value = asdict(value)
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{stage} must be a dict of the keys of [{stage}] or a {config.__name__}, got "
            f"{value!r}."
        )
    return {
        key.replace("-", "_"): list(v) if isinstance(v, tuple) else v for key, v in value.items()
    }


def _strategy_table(strategy: Any, num_rounds: int | None) -> dict[str, Any]:
    """Return the keys of [strategy] that a strategy's name or its keys stand for."""
    table = {} if num_rounds is None else {"num_rounds": num_rounds}
    if strategy is None:
        return table
    if isinstance(strategy, str):
        return {"name": strategy, **table}
    return {**_table("strategy", StrategyConfig, strategy), **table}


def _cache_key(given: Tables) -> dict[str, Any]:
    return {key: v for key, v in given.get("run", {}).items() if key == "cache"}


def _refuse_twice(by_model: Tables, given: Tables) -> None:
    """Refuse a setting that the model decides already, where it says otherwise.

    Raises:
        ConfigError: It names the key.
    """
    for stage, table in by_model.items():
        for key, value in given.get(stage, {}).items():
            wanted = {name.replace("-", "_"): wish for name, wish in table.items()}
            if stage in ("mask", "structure") or wanted.get(key, value) != value:
                raise ConfigError(
                    f"{stage}.{key.replace('_', '-')} is decided by the model and its PetConfig: "
                    f"leave it out of the settings, or give the model without a PetConfig."
                )


def _laid_over(below: Mapping[str, Mapping[str, Any]], above: Tables) -> Tables:
    """Join tables, keys in snake_case; where both have a key, the upper value."""
    tables: Tables = {}
    for stage, table in (*below.items(), *above.items()):
        for key, value in table.items():
            tables.setdefault(stage, {})[key.replace("-", "_")] = value
    return tables


def _listed(one_or_more: Any) -> list[Any]:
    return [one_or_more] if isinstance(one_or_more, str | Callback) else list(one_or_more)
