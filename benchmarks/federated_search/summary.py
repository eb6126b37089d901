"""What came out of a table of federated search.

In:  a `FederatedSearchRun` and the cells that are there.
Out: a row a method with its metric and bytes, and how alike the structures are.
"""

from __future__ import annotations

import statistics
from typing import Any

from rich.table import Table

from benchmarks.federated_search.running import METHODS, FederatedSearchRun, bytes_of
from benchmarks.statistics import jaccard, over
from benchmarks.table.cell import read_cell
from fedpet.utils.formatting import format_bytes


def final_table(job: FederatedSearchRun) -> Table:
    """Mean and deviation over the seeds, and over random ones; bytes by kind, a row a method."""
    title = "mean over seeds, deviation; over random: mean, standard error"
    shown = Table(title=title, title_justify="left", box=None)
    for head in (
        *("structure", "metric", "", "over random", ""),
        *("values", "search", "training", "rate"),
    ):
        shown.add_column(head, justify="left" if head in ("structure", "") else "right")
    rows = summary(job)
    random = next((row["by_seed"] for row in rows if row["method"] == "random"), None)
    for row in rows:
        more = None
        if random is not None and row["method"] != "random":
            more = over(row["by_seed"], random)
        shown.add_row(
            row["method"],
            f"{row['mean']:.4f}",
            f"± {row['deviation']:.4f}",
            *((f"{more[0]:+.4f}", f"± {more[1]:.4f}") if more else ("", "")),
            f"{row['values']:,.0f}",
            format_bytes(row["search_bytes"]) if row["search_bytes"] else "",
            format_bytes(row["training_bytes"]),
            row["rate"],
        )
    return shown


def summary(job: FederatedSearchRun) -> list[dict[str, Any]]:
    """A row for each method whose final cells are all there; random ones first averaged."""
    rows = []
    for method in METHODS:
        cells = [c for c in job.known("final") if c.method.name.rstrip("0123456789") == method]
        results = [(cell.experiment.run.seed, read_cell(cell)) for cell in cells]
        done = [(seed, result) for seed, result in results if result is not None]
        if not done or len(done) < len(results):
            continue
        by_seed = [
            statistics.mean(r["quality"]["final"] for s, r in done if s == seed)
            for seed in job.table.seeds
        ]
        search = [bytes_of(r, "search") for _, r in done]
        rows.append(
            {
                "method": method,
                "mean": statistics.mean(by_seed),
                "deviation": statistics.stdev(by_seed) if len(by_seed) > 1 else 0.0,
                "by_seed": by_seed,
                "values": statistics.mean(r["model"]["structure_values"] for _, r in done),
                "search_bytes": statistics.mean(search),
                "training_bytes": statistics.mean(bytes_of(r, "training") for _, r in done),
                "rate": str(cells[0].rate),
            }
        )
    return rows


def overlaps(job: FederatedSearchRun) -> list[tuple[str, float]]:
    """How alike the structures are: mean Jaccard index over modules, by what is compared."""
    sets: dict[str, dict[int, list[set[tuple[str, str]]]]] = {m: {} for m in METHODS}
    for cell in job.known("final"):
        result = read_cell(cell)
        if result is not None and "modules" in result:
            method = cell.method.name.rstrip("0123456789")
            modules = {(kind, target) for kind, target in result["modules"]}
            sets[method].setdefault(cell.experiment.run.seed, []).append(modules)
    found: list[tuple[str, float]] = []
    for index, one in enumerate(METHODS):
        for other in METHODS[index:]:
            pairs = [
                jaccard(a, b)
                for first, these in sets[one].items()
                for second, those in sets[other].items()
                # Of one method those of different seeds; of two those of one seed.
                if (first < second if one == other else first == second)
                for a in these
                for b in those
            ]
            if pairs:
                what = f"{one}, seeds" if one == other else f"{one} and {other}"
                found.append((what, statistics.mean(pairs)))
    return found
