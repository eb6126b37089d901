"""Show what the suite's cells came to: a table of all rows, one a question, costs; as Markdown.

Differences are in points of the metric (hundredths), seed by seed, mean ± standard error over the
seeds that both rows have. Bytes are those of the ledgers, of all clients and rounds, both ways.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.table import Table

from benchmarks.probe import PROBE
from benchmarks.suite import DataSet, Row, Suite
from benchmarks.tables import over
from fedpet.utils.formatting import format_bytes

__all__ = [
    "Summary",
    "all_methods",
    "clients_searches",
    "costs_table",
    "difficulty",
    "markdown",
    "methods_of",
    "points",
    "question",
    "references",
    "suite_table",
    "summarise_row",
    "where_it_stands",
]

NOT_RUN = "No cell of these rows has been run yet."
TARGETS = (0.95, 0.99)  # of full fine-tuning's metric
FULL = "full"


@dataclass(frozen=True)
class Summary:
    """Hold the outcome of a method on a data set.

    Attributes:
        by_seed: The metric at the end; 0 where a run learned nothing.
        majority: The metric of the most frequent class.
        total_bytes: Mean over the seeds.
        dense_bytes: Of dense FedAvg for the same rounds and clients.
        values: That are sent.
        curves: By seed: of each evaluated round its number, the metric, bytes up to its end.
    """

    by_seed: dict[int, float]
    majority: float
    total_bytes: float
    dense_bytes: float
    values: int
    curves: dict[int, list[list[float]]]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.mean(self.by_seed.values())

    @property
    def shown(self) -> str:
        """Mean ± deviation; of fewer than three seeds, how many."""
        values = list(self.by_seed.values())
        if len(values) == 1:
            return f"{self.mean:.4f} (1 seed)"
        many = "" if len(values) > 2 else f" ({len(values)} seeds)"
        return f"{self.mean:.4f} ± {statistics.stdev(values):.4f}{many}"


def summarise_row(suite: Suite, dataset: DataSet, method: Row) -> Summary | None:
    """Sum up the finished cells of a row; None where there is none."""
    results = suite.results_of(dataset, method)
    learned = [result for result in results.values() if "quality" in result]
    if not learned:
        return None
    sent = [result.get("communication", {}) for result in learned]
    return Summary(
        by_seed={
            seed: result["quality"]["final"] or 0.0 if "quality" in result else 0.0
            for seed, result in sorted(results.items())
        },
        majority=learned[0]["quality"]["majority_baseline"],
        total_bytes=statistics.mean(one.get("total_bytes", 0) for one in sent),
        dense_bytes=statistics.mean(one.get("dense_fedavg_total_bytes", 0) for one in sent),
        values=learned[0].get("model", {}).get("communicated_values", 0),
        curves={seed: result.get("curve", []) for seed, result in results.items()},
    )


def paired(one: Summary, other: Summary) -> tuple[float, float, int]:
    """Return one - other seed by seed, in points: mean, standard error, number of seeds."""
    seeds = sorted(set(one.by_seed) & set(other.by_seed))
    if not seeds:
        return float("nan"), 0.0, 0
    mean, error = over([one.by_seed[s] for s in seeds], [other.by_seed[s] for s in seeds])
    return 100 * mean, 100 * error, len(seeds)


def until(row: Summary, full: Summary, fraction: float) -> tuple[float, float] | None:
    """Return rounds and bytes until a fraction of full fine-tuning's final metric, seed by seed.

    Returns:
        Means over the seeds of the first evaluated round that comes to it; None where a seed of
        both never does.
    """
    reached = []
    for seed in sorted(set(row.by_seed) & set(full.by_seed)):
        target = fraction * full.by_seed[seed]
        first = next((point for point in row.curves[seed] if point[1] >= target), None)
        if first is None:
            return None
        reached.append((first[0], first[2]))
    if not reached:
        return None
    return statistics.mean(r for r, _ in reached), statistics.mean(b for _, b in reached)


def _rows_of(suite: Suite, dataset: DataSet) -> Iterator[tuple[Row, Summary]]:
    for place, method in suite.work:
        if place.name == dataset.name and method.runs != PROBE:
            summary = summarise_row(suite, dataset, method)
            if summary is not None:
                yield method, summary


def _table_cells(suite: Suite, dataset: DataSet) -> Iterator[list[str]]:
    rows = sorted(_rows_of(suite, dataset), key=lambda row: -row[1].total_bytes)
    full = next((summary for method, summary in rows if method.name == FULL), None)
    for method, summary in rows:
        choice = suite.choice(dataset, method)
        cells = [method.name, f"{summary.values:,}", summary.shown]
        against = ""
        if full is not None and method.name != FULL:
            mean, error, seeds = paired(summary, full)
            against = f"{mean:+.1f} ± {error:.1f}" if seeds > 1 else f"{mean:+.1f}"
        cells += [against, format_bytes(summary.total_bytes)]
        cells.append(f"1/{summary.dense_bytes / summary.total_bytes:,.0f}")
        for fraction in TARGETS:
            found = None if full is None else until(summary, full, fraction)
            text = "–" if found is None else f"{found[0]:.0f}, {format_bytes(found[1])}"
            cells.append(text)
        rate = f"{choice.best:g}" + (" (edge)" if choice.at_edge else "")
        yield [*cells, rate]


HEADS = ("method", "values", "metric", "to full, points", "sent", "of dense")
TARGET_HEADS = tuple(f"rounds, bytes to {fraction:.0%} of full" for fraction in TARGETS)


def suite_table(suite: Suite) -> Table:
    """Show all finished rows in a terminal."""
    shown = Table(box=None)
    for head in ("data", *HEADS, *TARGET_HEADS, "rate"):
        shown.add_column(head)
    for dataset in suite.datasets.values():
        for cells in _table_cells(suite, dataset):
            shown.add_row(dataset.name, *cells)
    return shown


def costs_table(suite: Suite) -> Table:
    """Show what is left to run, by data set: cells, core-seconds, and the sum in hours."""
    shown = Table(title="to be run, grids that move left out", title_justify="left", box=None)
    for head in ("data", "methods", "cells", "core-seconds a cell", "core-hours"):
        shown.add_column(head, justify="left" if head == "data" else "right")
    rows = suite.costs()
    total = 0.0
    for name in dict.fromkeys(name for name, *_ in rows):
        here = [row for row in rows if row[0] == name]
        cells, seconds = sum(row[2] for row in here), sum(row[3] for row in here)
        total += seconds
        shown.add_row(
            name, str(len(here)), str(cells), f"{seconds / cells:.0f}", f"{seconds / 3600:.2f}"
        )
    shown.add_row("all", "", str(sum(row[2] for row in rows)), "", f"{total / 3600:.2f}")
    return shown


# -- Markdown


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Write a table: the first columns to the left, numbers to the right."""
    rule = "|".join(["---"] * left + ["---:"] * (len(heads) - left))
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def methods_of(suite: Suite, name: str) -> str:
    """Write the table of all finished methods of a data set."""
    heads = (*HEADS, *TARGET_HEADS, "rate")
    rows = list(_table_cells(suite, suite.datasets[name]))
    return markdown(heads, rows) if rows else NOT_RUN


def all_methods(suite: Suite) -> str:
    """Write the tables of all data sets that have a finished row."""
    parts = [
        f"**{name}**\n\n{table}"
        for name in suite.datasets
        if (table := methods_of(suite, name)) != NOT_RUN
    ]
    return "\n\n".join(parts) or NOT_RUN


def where_it_stands(suite: Suite) -> str:
    """Write how much of the suite has been run, and what it took and will take."""
    spent = sum(result["time"]["processor_seconds"] for result in suite.read_results())
    left = suite.costs()
    cells, seconds = sum(row[2] for row in left), sum(row[3] for row in left)
    done = len(suite.finished())
    if not left:
        return f"All {done} cells have been run, in {spent / 3600:.1f} core-hours."
    return (
        f"{done} cells have been run, in {spent / 3600:.1f} core-hours; {cells} are left, about "
        f"{seconds / 3600:.0f} core-hours. A row with fewer than three seeds says so."
    )


def difficulty(suite: Suite) -> str:
    """Write how hard each task is: majority, probe, full fine-tuning, and what that adds."""
    rows = []
    for dataset in suite.datasets.values():
        probe = summarise_row(suite, dataset, suite.methods[PROBE])
        full = summarise_row(suite, dataset, suite.methods[FULL])
        if probe is None:
            continue
        (result,) = suite.results_of(dataset, suite.methods[PROBE]).values()
        about = result["quality"]
        edge = ", strength at its edge" if about.get("at_edge") else ""
        added = "–" if full is None else f"{100 * (full.mean - probe.mean):+.1f}"
        rows.append(
            [
                dataset.name,
                about["metric"],
                f"{about['majority_baseline']:.4f}",
                f"{probe.mean:.4f} ({about['feature']}{edge})",
                "–" if full is None else full.shown,
                added,
            ]
        )
    heads = ("data", "metric", "majority", "probe", "full fine-tuning", "full over probe, points")
    if not rows:
        return NOT_RUN
    return markdown(heads, rows, left=2)


def question(suite: Suite, base: str, others: Sequence[str], datasets: Sequence[str]) -> str:
    """Write how other rows compare with one: points more, and bytes as a multiple of its bytes.

    Args:
        suite: With its results.
        base: The row that the others are compared with.
        others: Rows; those without a finished cell are left out, as are data sets without the base.
        datasets: Columns.
    """
    grounds = {
        name: ground
        for name in datasets
        if (ground := summarise_row(suite, suite.datasets[name], suite.methods[base])) is not None
    }
    sizes = [f"{one.mean:.4f}, {format_bytes(one.total_bytes)}" for one in grounds.values()]
    rows = [[f"**{base}**", *sizes]]
    for name in others:
        cells = [name]
        for place, ground in grounds.items():
            row = summarise_row(suite, suite.datasets[place], suite.methods[name])
            cells.append("–" if row is None else _compared(row, ground))
        if any(cell != "–" for cell in cells[1:]):
            rows.append(cells)
    return markdown(("method", *grounds), rows) if len(rows) > 1 else NOT_RUN


def _compared(row: Summary, ground: Summary) -> str:
    mean, error, seeds = paired(row, ground)
    spread = {0: "", 1: " (1 seed)"}.get(seeds, f" ± {error:.1f}")
    return f"{mean:+.1f}{spread}, {row.total_bytes / ground.total_bytes:.2g} x bytes"


def clients_searches(suite: Suite) -> str:
    """Write what searches by the clients cost, beside three rounds of training what they found."""
    rows = []
    for dataset, method in suite.work:
        if not suite.experiment(dataset, method).search.federated:
            continue
        cells = (suite.structure_cell(dataset, method, seed) for seed in suite.seeds_of(method))
        found = [result for cell in cells if (result := suite.read(cell)) is not None]
        trained = summarise_row(suite, dataset, method)
        if not found or trained is None:
            continue
        costs = [result["structure"].provenance["search"] for result in found]
        sent = statistics.mean(
            sum(cost[f"{part}_bytes"] for part in ("uplink", "downlink", "plan")) for cost in costs
        )
        rounds = suite.experiment(dataset, method).strategy.num_rounds
        searched, seconds = (
            statistics.mean(cost[key] for cost in costs) for key in ("rounds", "processor_seconds")
        )
        sizes = [format_bytes(sent), format_bytes(3 * trained.total_bytes / rounds)]
        rows.append([dataset.name, f"{len(costs)}", f"{searched:.1f}", *sizes, f"{seconds:.0f}"])
    heads = ("data", "searches", "rounds", "sent", "three rounds of training", "core-seconds")
    return markdown(heads, rows) if rows else NOT_RUN


def points(suite: Suite) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Return by data set and method: bytes, mean of the metric, its deviation; for the picture."""
    found: dict[str, dict[str, tuple[float, float, float]]] = {}
    for dataset in suite.datasets.values():
        for method, summary in _rows_of(suite, dataset):
            values = list(summary.by_seed.values())
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            here = found.setdefault(dataset.name, {})
            here[method.name] = (summary.total_bytes, summary.mean, spread)
    return found


def references(suite: Suite) -> dict[str, dict[str, float]]:
    """Return the probe's and the majority's metric by data set."""
    found: dict[str, dict[str, float]] = {}
    for dataset in suite.datasets.values():
        probe = summarise_row(suite, dataset, suite.methods[PROBE])
        if probe is not None:
            found[dataset.name] = {"probe": probe.mean, "majority": probe.majority}
    return found
