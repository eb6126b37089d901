"""Average runs that differ in their seed alone, and set them beside full fine-tuning.

In:  results (fedpet/report/results.py).
Out: a `Row` a method and experiment, and the columns that a table of rows has.

Runs of one method that differ in a setting (a density, a codec) are rows of their own; `notes` says
what tells them apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedpet.report.number_format import show_baseline, show_count, show_percent, show_ratio
from fedpet.utils.formatting import format_bytes

__all__ = ["Column", "Row", "RunGroup", "columns_of", "compare_rows", "group_runs", "notes"]

REFERENCE = "full"  # the method that others are measured against
MAX_WARNINGS = 3  # of a row, shown in full

Column = tuple[str, Callable[["Row"], str]]  # a heading, broken where it may be, and a cell's text
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
        """Return what the runs of one table have in common."""
        return self.experiment, self.conditions, self.metric

    @property
    def title(self) -> str:
        """Return the title of its table."""
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
        for conditions, asked in _split(everything, ("data.", "clients.")).items():
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
    best = _best(full)
    if not best.mean > 0:
        return row
    return replace(
        row,
        fraction_of_full=row.mean / best.mean,
        ratio_to_full=row.total_bytes / best.total_bytes,
    )


def _best(rows: Sequence[Row]) -> Row:
    """Return the row of the highest mean; a diverged one is below all others."""
    return max(rows, key=lambda row: -math.inf if math.isnan(row.mean) else row.mean)


def notes(rows: Sequence[Row]) -> Iterator[str]:
    """Yield what tells rows of one method apart, the warnings of runs, and the baseline."""
    for row in rows:
        if row.group.settings:
            settings = ", ".join(f"{key} = {value}" for key, value in row.group.settings)
            yield f"{row.group.name}: {settings}"
        if row.runs > row.seeds:
            yield (
                f"{row.group.name}: {row.runs} runs over {row.seeds} seeds were averaged; they "
                "differ in something beside the seed that is not in their settings."
            )
        yield from _warnings(row)
    yield from _baseline(rows)
    full = [row for row in rows if row.group.method == REFERENCE]
    if len(full) > 1:
        best = _best(full)
        yield f'"of full" is of {best.group.name}, the best of {len(full)}.'


def _warnings(row: Row) -> Iterator[str]:
    """Yield the warnings of a row's runs, a few in full."""
    warnings = []
    for run in row.group.runs:
        status = run["run"].get("status", "ok")
        troubles = [] if status == "ok" else [status]
        troubles += run["quality"].get("warnings", ())
        warnings += [f"{row.group.name}, seed {run['run']['seed']}: {text}" for text in troubles]
    yield from warnings[:MAX_WARNINGS]
    if len(warnings) > MAX_WARNINGS:
        more = len(warnings) - MAX_WARNINGS
        yield f"{row.group.name}: {more} more warnings in the runs' result.json."


def _baseline(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the majority baseline of the rows' evaluation, where results name it."""
    found = dict.fromkeys(
        show_baseline(run["quality"])
        for row in rows
        for run in row.group.runs
        if "majority_baseline" in run["quality"]
    )
    if found:
        yield f"Majority baseline of {rows[0].group.metric}: {'; '.join(sorted(found))}."


def columns_of(rows: Sequence[Row], between: str = " ") -> list[Column]:
    """Return the columns that rows of one experiment have beside their names.

    Args:
        rows: Of one table.
        between: What stands between a mean and its deviation.

    Returns:
        Seeds, metric, values, bytes up, down and in total, against dense FedAvg; and against full
        fine-tuning, where it is among the rows' experiment.
    """
    columns: list[Column] = [
        ("seeds", lambda row: str(row.seeds)),
        (rows[0].group.metric, lambda row: _show_mean(row, between)),
        ("of\nfull", lambda row: _or_dash(show_percent, row.fraction_of_full)),
        ("values", lambda row: show_count(row.communicated_values)),
        ("up, client\nand round", lambda row: format_bytes(row.uplink_bytes_per_client_round)),
        ("down, client\nand round", lambda row: format_bytes(row.downlink_bytes_per_client_round)),
        ("sent in\ntotal", lambda row: format_bytes(row.total_bytes)),
        ("of full's\nbytes", lambda row: _or_dash(show_ratio, row.ratio_to_full)),
        ("of dense\nFedAvg", lambda row: show_ratio(row.ratio_to_dense)),
    ]
    if any(row.fraction_of_full is not None for row in rows):
        return columns
    return [column for column in columns if REFERENCE not in column[0]]


def _show_mean(row: Row, between: str) -> str:
    deviation = "" if row.deviation is None else f"{between}± {row.deviation:.4f}"
    return f"{row.mean:.4f}{deviation}"


def _or_dash(show: Callable[[float], str], value: float | None) -> str:
    return "–" if value is None else show(value)
