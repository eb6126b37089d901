"""Runs side by side: one row a method, averaged over its seeds.

    ... -> strategy -> ledger -> [report]

In:  run folders, `result.json` files, cell files of a benchmark, or folders of any of these.
Out: a Rich table an experiment: quality, and bytes, beside full fine-tuning and dense FedAvg.

Runs of one method that differ in a setting (a density, a codec) are rows of their own; what tells
them apart stands below the table.
"""

from __future__ import annotations

import json
import logging
import math
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from fedpet.config import Experiment
from fedpet.errors import InputError
from fedpet.report.numbers import show_count, show_percent, show_ratio
from fedpet.units import show_bytes

__all__ = ["Row", "RunGroup", "compare_rows", "compare_table", "group_runs", "read_results"]

SCHEMA = 1
REFERENCE = "full"  # the method that others are measured against
# Keys that a reader of results relies on.
NEEDED: Mapping[str, tuple[str, ...]] = {
    "run": ("experiment", "method", "seed"),
    "model": ("communicated_values",),
    "quality": ("metric", "final"),
    "communication": (
        "uplink_bytes_per_client_round",
        "downlink_bytes_per_client_round",
        "total_bytes",
        "dense_fedavg_total_bytes",
    ),
}
# What may differ between runs of one row.
_FREE = ("run.",)

log = logging.getLogger(__name__)


Settings = tuple[tuple[str, str], ...]  # dotted keys and values


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ in their seed alone, so far as is known: a row of a table."""

    experiment: str
    conditions: Settings  # data and clients, where runs of one experiment differ in them
    metric: str
    method: str
    settings: Settings  # in which it differs from other groups of this method
    runs: tuple[dict[str, Any], ...]
    name: str  # the method, and a letter where it has several groups

    @property
    def question(self) -> tuple[str, Settings, str]:
        """What the runs of one table have in common."""
        return self.experiment, self.conditions, self.metric

    @property
    def title(self) -> str:
        """Of the table it belongs to."""
        return ", ".join([self.experiment, *(f"{key} = {value}" for key, value in self.conditions)])


@dataclass(frozen=True)
class Row:
    """One method of one experiment, over its seeds. Bytes are means over the runs."""

    group: RunGroup
    seeds: int
    runs: int  # more than `seeds` where a seed was given twice with different outcomes
    mean: float
    deviation: float | None  # of a sample, n - 1; None for a single run
    communicated_values: float
    uplink_bytes_per_client_round: float
    downlink_bytes_per_client_round: float
    total_bytes: float
    dense_fedavg_total_bytes: float
    fraction_of_full: float | None = None  # of its mean metric; None without full fine-tuning
    ratio_to_full: float | None = None  # of the total bytes

    @property
    def ratio_to_dense(self) -> float:
        """Total bytes against those of dense FedAvg on the same rounds, by formula."""
        return self.total_bytes / self.dense_fedavg_total_bytes


def read_results(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Read the results that lie at `paths`.

    Args:
        paths: Run folders, result files, cell files (which hold a result under the key "result"),
            or folders to look for these in. A file reached twice counts once.

    Returns:
        The results as written, each with two keys more: "path", and "settings", the experiment's
        dotted keys and values so far as they are known.

    Raises:
        InputError: A path that is absent, holds no result, or one this version cannot read.
    """
    if not paths:
        raise InputError("there is nothing to compare: name run folders or result files.")
    found: dict[Path, dict[str, Any]] = {}
    for path in paths:
        if not path.exists():
            raise InputError(f"there is no run folder or result file {str(path)!r}.")
        given = list(_result_files(path)) if path.is_dir() else [(path, True)]
        results = {}
        for file, must in given:
            result = _read(file, must)
            if result is not None:
                results[file.resolve()] = result
        if not results:
            raise InputError(
                f"the folder {str(path)!r} holds no finished run: no result.json, and no other "
                'JSON file with a result under the key "result".'
            )
        found.update(results)
    return list(found.values())


def compare_table(results: Sequence[dict[str, Any]]) -> RenderableType:
    """Show what `read_results` gives: a table an experiment, cheapest last."""
    rows = compare_rows(results)
    parts: list[RenderableType] = []
    for question in dict.fromkeys(row.group.question for row in rows):
        chosen = [row for row in rows if row.group.question == question]
        parts += [*([""] if parts else []), _Fitting(chosen), *map(Text, notes(chosen))]
    return Group(*parts)


def compare_rows(results: Sequence[dict[str, Any]]) -> list[Row]:
    """Average results over seeds: by experiment, full fine-tuning first, then falling bytes."""
    rows = [_average(group) for group in group_runs(results)]
    return [_against_full(row, rows) for row in rows]


def group_runs(results: Sequence[dict[str, Any]]) -> list[RunGroup]:
    """Put runs that differ in their seed alone together, in the order of `compare_rows`."""
    experiments: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        key = (result["run"]["experiment"], result["quality"]["metric"])
        experiments.setdefault(key, []).append(result)
    groups: list[RunGroup] = []
    for (experiment, metric), everything in experiments.items():
        for conditions, asked in _split(everything, ("data.", "population.")).items():
            methods: dict[str, list[dict[str, Any]]] = {}
            for result in asked:
                methods.setdefault(result["run"]["method"], []).append(result)
            found = [
                RunGroup(experiment, conditions, metric, method, settings, tuple(runs), method)
                for method, members in methods.items()
                for settings, runs in _split(members, ("",)).items()
            ]
            found.sort(
                key=lambda group: (
                    group.method != REFERENCE,
                    -_mean(run["communication"]["total_bytes"] for run in group.runs),
                    group.settings,
                )
            )
            groups += _named(found)
    return groups


def _result_files(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Candidates below a folder, and whether each must be a result. A run folder is one."""
    if (folder / "result.json").is_file():
        yield folder / "result.json", True
        return
    if (folder / "config.toml").is_file():
        log.warning("Left out: %s has not finished, it has no result.json.", folder)
        return
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            yield from _result_files(entry)
        elif entry.suffix == ".json" and not entry.name.startswith("."):
            yield entry, False


def _read(path: Path, must: bool) -> dict[str, Any] | None:
    """Read one file; None where it is no result and need not be one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} is not a readable JSON file: {error}.") from None
    cell = content if isinstance(content, dict) else {}
    result = cell.get("result", content)
    if not isinstance(result, dict) or not set(NEEDED) <= set(result):
        if must:
            raise InputError(
                f"{str(path)!r} is no result: it needs the keys {', '.join(NEEDED)}, at its top "
                'or under the key "result", as result.json of a run folder has them.'
            )
        return None
    if not isinstance(result.get("schema"), int) or result["schema"] > SCHEMA:
        raise InputError(
            f"this fedpet reads results of schema {SCHEMA}, {str(path)!r} has schema "
            f"{result.get('schema')!r}: read it with the fedpet that wrote it, or a newer one."
        )
    for part, names in NEEDED.items():
        for name in names:
            if not isinstance(result[part], dict) or result[part].get(name) is None:
                raise InputError(
                    f"the result {str(path)!r} lacks {part}.{name}: the run that wrote it did not "
                    "end, or wrote another format; run it again."
                )
    return {**result, "path": str(path), "settings": _settings(cell, path)}


def _settings(cell: Mapping[str, Any], path: Path) -> dict[str, str]:
    """An experiment's dotted keys: from config.toml beside the result, or from the cell."""
    config = path.parent / "config.toml"
    tables: Mapping[str, Any] = cell
    if path.name == "result.json" and config.is_file():
        try:
            tables = tomllib.loads(config.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{str(config)!r} is not a readable TOML file: {error}.") from None
    known = {f"{stage}.{key}" for stage, table in Experiment().to_tables().items() for key in table}
    found = {key: value for key, value in _dotted(tables) if key in known}
    return {key: _plain(found[key]) for key in sorted(found) if not key.startswith(_FREE)}


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _dotted(value: Any, parents: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """All `stage.key` with their values: of nested tables, and of "stage.key=value" strings."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if not (name == "result" and not parents):
                yield from _dotted(inner, (*parents, *str(name).replace("_", "-").split(".")))
        return
    if isinstance(value, list):
        for entry in value:
            if isinstance(entry, str) and "=" in entry:
                key, _, text = entry.partition("=")
                yield key.strip().replace("_", "-"), text.strip().strip("\"'")
    yield ".".join(parents[-2:]), value


def _split(
    results: Sequence[dict[str, Any]], prefixes: tuple[str, ...]
) -> dict[Settings, list[dict[str, Any]]]:
    """Split runs by the settings that all of them name and in which they differ."""
    tables = [result.get("settings", {}) for result in results]
    named = set.intersection(*(set(table) for table in tables))
    differing = sorted(
        key
        for key in named
        if key.startswith(prefixes) and len({table[key] for table in tables}) > 1
    )
    parts: dict[Settings, list[dict[str, Any]]] = {}
    for result, table in zip(results, tables, strict=True):
        parts.setdefault(tuple((key, table[key]) for key in differing), []).append(result)
    return parts


def _named(groups: Sequence[RunGroup]) -> list[RunGroup]:
    """Add letters where a method has several groups."""
    methods = [group.method for group in groups]
    counts = dict.fromkeys(methods, 0)
    named = []
    for group in groups:
        counts[group.method] += 1
        alone = methods.count(group.method) == 1
        letter = "" if alone else f" {_letter(counts[group.method])}"
        named.append(replace(group, name=f"{group.method}{letter}"))
    return named


def _letter(number: int) -> str:
    return "abcdefghijklmnopqrstuvwxyz"[number - 1] if number <= 26 else str(number)


def _average(group: RunGroup) -> Row:
    distinct = {
        (run["run"]["seed"], run["quality"]["final"], run["communication"]["total_bytes"]): run
        for run in group.runs
    }
    runs = list(distinct.values())  # one run given twice counts once
    finals = [float(run["quality"]["final"]) for run in runs]
    mean = _mean(finals)
    spread = sum((value - mean) ** 2 for value in finals)

    def average(name: str) -> float:
        return _mean(run["communication"][name] for run in runs)

    return Row(
        group=group,
        seeds=len({run["run"]["seed"] for run in runs}),
        runs=len(runs),
        mean=mean,
        deviation=math.sqrt(spread / (len(runs) - 1)) if len(runs) > 1 else None,
        communicated_values=_mean(run["model"]["communicated_values"] for run in runs),
        uplink_bytes_per_client_round=average("uplink_bytes_per_client_round"),
        downlink_bytes_per_client_round=average("downlink_bytes_per_client_round"),
        total_bytes=average("total_bytes"),
        dense_fedavg_total_bytes=average("dense_fedavg_total_bytes"),
    )


def _mean(values: Iterable[float]) -> float:
    listed = [float(value) for value in values]
    return sum(listed) / len(listed)


def _against_full(row: Row, rows: Sequence[Row]) -> Row:
    """Set a row against full fine-tuning on the same question; against the best, of several."""
    full = [
        other
        for other in rows
        if other.group.question == row.group.question and other.group.method == REFERENCE
    ]
    if not full:
        return row
    best = max(full, key=lambda other: other.mean)
    if best.mean <= 0:
        return row
    return replace(
        row,
        fraction_of_full=row.mean / best.mean,
        ratio_to_full=row.total_bytes / best.total_bytes,
    )


def notes(rows: Sequence[Row]) -> Iterator[str]:
    """What tells the rows of one method apart."""
    for row in rows:
        if row.group.settings:
            told = ", ".join(f"{key} = {value}" for key, value in row.group.settings)
            yield f"{row.group.name}: {told}"
        if row.runs > row.seeds:
            yield (
                f"{row.group.name}: {row.runs} runs over {row.seeds} seeds were averaged; they "
                "differ in something beside the seed that is not in their settings."
            )
    full = [row for row in rows if row.group.method == REFERENCE]
    if len(full) > 1:
        best = max(full, key=lambda row: row.mean)
        yield f'"of full" is of {best.group.name}, the best of {len(full)}.'


def _over(
    header: str, upper: Callable[[Row], str], lower: Callable[[Row], str]
) -> tuple[str, Callable[[Row], str]]:
    """Two columns as one, the one above the other."""
    return header, lambda row: f"{upper(row)}\n{lower(row)}"


@dataclass(frozen=True)
class _Fitting:
    """One experiment's table: a line a row where there is room, else two."""

    rows: Sequence[Row]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = _table(self.rows, stacked=False)
        needed = Measurement.get(console, options.update(width=1000), wide).maximum
        yield wide if needed <= options.max_width else _table(self.rows, stacked=True)


def _table(rows: Sequence[Row], *, stacked: bool) -> Table:
    between = "\n" if stacked else " "
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("seeds", lambda row: str(row.seeds)),
        (rows[0].group.metric, lambda row: _show_mean(row, between)),
        ("of\nfull", lambda row: _or_dash(show_percent, row.fraction_of_full)),
        ("values", lambda row: show_count(row.communicated_values)),
        ("up, client\nand round", lambda row: show_bytes(row.uplink_bytes_per_client_round)),
        ("down, client\nand round", lambda row: show_bytes(row.downlink_bytes_per_client_round)),
        ("sent in\ntotal", lambda row: show_bytes(row.total_bytes)),
        ("of full's\nbytes", lambda row: _or_dash(show_ratio, row.ratio_to_full)),
        ("of dense\nFedAvg", lambda row: show_ratio(row.ratio_to_dense)),
    ]
    with_full = any(row.fraction_of_full is not None for row in rows)
    if stacked:
        columns[4:6] = [_over("up, down,\na round", columns[4][1], columns[5][1])]
        if with_full:
            columns[-2:] = [_over("of full,\nof dense", columns[-2][1], columns[-1][1])]
    if not with_full:
        columns = [column for column in columns if "full" not in column[0]]
    table = Table(
        title=Text(rows[0].group.title, style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        header_style="none",
    )
    table.add_column("method", style="cyan", overflow="fold")
    for header, _ in columns:
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(Text(row.group.name), *(Text(show(row)) for _, show in columns))
    return table


def _show_mean(row: Row, between: str) -> str:
    deviation = "" if row.deviation is None else f"{between}± {row.deviation:.4f}"
    return f"{row.mean:.4f}{deviation}"


def _or_dash(show: Callable[[float], str], value: float | None) -> str:
    return "–" if value is None else show(value)
