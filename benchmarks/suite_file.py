"""Read the suite's file: data sets, methods, and what of them is run first.

results = "results/suite"        # a folder a data set, in it structures/, tune/, final/
most-rates = 6                   # of a moving grid, see moving_grid.py
tune-seed = 3
seeds = [0, 1, 2]
experiment = "chat"              # which all cells start from; left out, that of the defaults
[base.STAGE]                     # what differs from it
[datasets.NAME]
set = []; tune = []; final = []  # overrides of all its cells, and of a phase's
seconds = 60                     # guess of a cell, until one has been run
also = []                        # further splits on which the start and the end are evaluated
[methods.NAME]
runs = "fedpet"                  # or a baseline; NAME where it is left out
rate = 0.1                       # in the middle of the first grid: of every kind but
beside = ["head=0.03"]           # those with a rate of their own
rates-of = "OTHER"               # or that method's rates, as they were chosen
set = []
structure = "searched"           # or "drawn": made before the runs, as by `fedpet search`
times = 3                        # guess of a cell's time in those of others
seeds = [0, 1, 2, 3, 4]          # in the place of the suite's
[[work]]                         # what is most needed comes first
datasets = []; methods = []
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.cell import Run
from benchmarks.moving_grid import SIZE
from benchmarks.one_process import RUNS
from benchmarks.probe import PROBE
from benchmarks.suite import DataSet, Row, Suite
from benchmarks.table_keys import Keys, read_keys, strings
from fedpet.config import Experiment
from fedpet.config.builtin import experiment_file
from fedpet.errors import ConfigError

__all__ = ["read_suite"]


def read_suite(
    path: Path, *, folder: Path | None = None, only: Sequence[str] = (), run: Run | None = None
) -> Suite:
    """Read a suite's file.

    Args:
        path: The TOML file.
        folder: Of the data sets.
        only: Names of data sets, methods, or DATA SET/METHOD; () for all.
        run: Runs a cell; None for `Cell.run`.

    Raises:
        ConfigError: Unknown or missing keys or names.
    """
    top = read_keys(path)
    datasets = {n: _dataset(n, t) for n, t in top.take("datasets", dict).items()}
    methods = {n: _row(n, t) for n, t in top.take("methods", dict).items()}
    for name, row in methods.items():
        other = methods.get(row.rates_of)
        if row.rates_of and (other is None or not other.rate):
            raise ConfigError(f"{name!r} takes the rates of {row.rates_of!r}, which has none.")
        if other is not None:
            methods[name] = replace(row, beside=other.beside)
    work: dict[tuple[str, str], tuple[DataSet, Row]] = {}
    for table in top.take("work", list):
        keys = Keys("[[work]]", table)
        places = _named(keys.take("datasets", list), datasets, "data set")
        rows = _named(keys.take("methods", list), methods, "method")
        keys.refuse_others()
        work |= {(place, row): (datasets[place], methods[row]) for place in places for row in rows}
    known = {*datasets, *methods, *(f"{place}/{row}" for place, row in work)}
    for name in only:
        if name not in known:
            raise ConfigError(
                f"--only {name!r} is neither a data set nor a method of the suite, nor both as "
                f"DATA SET/METHOD. Data sets are {', '.join(datasets)}; methods "
                f"{', '.join(methods)}."
            )
    chosen = [
        pair
        for (place, row), pair in work.items()
        if not only or {place, row, f"{place}/{row}"} & set(only)
    ]
    suite = Suite(
        results=path.parent / top.take("results", str, f"results/{path.stem}"),
        base=_base(top, path),
        datasets=datasets,
        methods=methods,
        work=tuple(chosen),
        tune_seed=top.take("tune-seed", int),
        seeds=tuple(top.take("seeds", list)),
        most_rates=top.take("most-rates", int),
        folder=folder,
        run=run,
    )
    top.refuse_others()
    seeds = {seed for row in methods.values() for seed in suite.seeds_of(row)}
    if suite.tune_seed in seeds or suite.most_rates < SIZE:
        raise ConfigError(
            f"tune-seed must be none of seeds, and most-rates at least {SIZE}, got "
            f"{suite.tune_seed}, {sorted(seeds)} and {suite.most_rates}."
        )
    for dataset, method in suite.work:
        tune, final = (
            suite.experiment(dataset, method, more).data for more in (dataset.tune, dataset.final)
        )
        if tune.eval_split == final.eval_split:
            raise ConfigError(
                f"[datasets.{dataset.name}] tunes and reports on the rows of "
                f"{final.eval_split!r}: choose rates on rows that no result is reported on."
            )
    return suite


def _base(top: Keys, path: Path) -> dict[str, dict[str, Any]]:
    """Return the tables that all cells start from."""
    name = top.take("experiment", str, "")
    changes: dict[str, dict[str, Any]] = top.take("base", dict, {})
    if not name:
        return changes
    tables = Experiment.from_file(experiment_file(name, path.parent)).to_tables()
    return {stage: {**table, **changes.get(stage, {})} for stage, table in tables.items()}


def _dataset(name: str, table: Any) -> DataSet:
    keys = Keys(f"[datasets.{name}]", table)
    found = DataSet(
        name,
        strings(keys.take("set", list, []), f"[datasets.{name}] set"),
        strings(keys.take("tune", list), f"[datasets.{name}] tune"),
        strings(keys.take("final", list), f"[datasets.{name}] final"),
        float(keys.take("seconds", int, 60)),
        strings(keys.take("also", list, []), f"[datasets.{name}] also"),
    )
    keys.refuse_others()
    return found


def _row(name: str, table: Any) -> Row:
    where = f"[methods.{name}]"
    keys = Keys(where, table)
    row = Row(
        name=name,
        runs=keys.take("runs", str, name),
        rate=float(keys.take("rate", float, 0.0)),
        beside=strings(keys.take("beside", list, []), f"{where} beside"),
        rates_of=keys.take("rates-of", str, ""),
        overrides=strings(keys.take("set", list, []), f"{where} set"),
        structure=keys.take("structure", str, ""),
        times=float(keys.take("times", int, 1)),
        seeds=tuple(keys.take("seeds", list, [])),
    )
    keys.refuse_others()
    if row.runs not in (*RUNS, PROBE):
        raise ConfigError(f"{where} runs {row.runs!r}. Known are: {', '.join((*RUNS, PROBE))}.")
    if row.structure not in ("", "searched", "drawn"):
        raise ConfigError(
            f"{where} structure must be 'searched' or 'drawn', got {row.structure!r}."
        )
    if (row.runs == PROBE) == bool(row.rate or row.rates_of) or (row.rate and row.rates_of):
        raise ConfigError(f"{where} must have a rate, or rates-of; the probe has neither.")
    return row


def _named(names: list[Any], known: Mapping[str, Any], what: str) -> list[str]:
    for name in names:
        if name not in known:
            raise ConfigError(f"[[work]] names the {what} {name!r}. Known are: {', '.join(known)}.")
    return [str(name) for name in names]
