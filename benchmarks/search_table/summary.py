"""What came out of a table of searched structures.

In:  a `SearchTableRun` and the cells that are there.
Out: what tuning took, a row for each data set, budget and method, and how alike structures are.
"""

from __future__ import annotations

import statistics
from typing import Any

from rich.table import Table
from rich.text import Text

from benchmarks.search_table.cell import read_cell
from benchmarks.search_table.running import SearchTableRun
from benchmarks.statistics import jaccard, over
from benchmarks.table.file import Rate


def tuning_table(job: SearchTableRun) -> Table:
    """The metric on the held rows at each rate; what is taken is in bold."""
    table = job.table
    title = f"tuned on {table.tune_rows} held rows, seed {table.tune_seed}"
    shown = Table(title=title, title_justify="left", box=None)
    for head in ("data", "budget", "structure"):
        shown.add_column(head)
    for rate in table.rates:
        shown.add_column(str(rate), justify="right")
    for dataset in table.datasets:
        for budget in table.budgets:
            taken = [job.settled(dataset, budget, m) for m in ("searched", "random", "manual")]
            for name in ("searched", "random", *table.presets):
                texts = []
                for rate, cell in zip(
                    table.rates, job.tune_cells(dataset, budget, name), strict=True
                ):
                    score = (read_cell(cell) or {})["score"]
                    style = "bold" if (name, rate) in taken else ""
                    texts.append(Text(f"{score:.4f}", style=style))
                shown.add_row(dataset.name, str(budget), name, *texts)
    return shown


def final_table(job: SearchTableRun) -> Table:
    """Mean and deviation over the seeds, and how much it is over random ones, seed by seed."""
    common = _common(job.table.rates)
    title = "mean over seeds, deviation; over random: mean, standard error"
    title += f"; all with {' '.join(common)}" if common else ""
    shown = Table(title=title, title_justify="left", box=None)
    for head in ("data", "budget", "structure", "metric", "", "over random", "", "values"):
        right = head in ("metric", "over random", "values")
        shown.add_column(head, justify="right" if right else "left")
    shown.add_column("set to")
    rows = summary(job)
    for row in rows:
        more = _over_random(row, rows)
        shown.add_row(
            row["dataset"],
            str(row["budget"]),
            row["method"],
            f"{row['mean']:.4f}",
            f"± {row['deviation']:.4f}",
            *((f"{more[0]:+.4f}", f"± {more[1]:.4f}") if more else ("", "")),
            f"{row['values']:,.0f}",
            " ".join(part for part in row["set_to"].split() if part not in common),
        )
    return shown


def _common(rates: tuple[Rate, ...]) -> list[str]:
    """What all points of the grid say alike of a kind of module: "head=0.005"."""
    parts = [str(rate).split() for rate in rates]
    return [part for part in parts[0] if "=" in part and all(part in other for other in parts)]


def _over_random(row: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[float, float] | None:
    """How much a method has over the random structures of its seed: mean and standard error."""
    place = (row["dataset"], row["budget"], "random")
    for other in rows:
        if (other["dataset"], other["budget"], other["method"]) == place and other is not row:
            return over(row["by_seed"], other["by_seed"])
    return None


def summary(job: SearchTableRun) -> list[dict[str, Any]]:
    """A row for each data set, budget and method whose final cells are all there.

    A seed's score is the mean over what it has several of: random structures, sources.
    """
    table, rows = job.table, []
    for dataset in table.datasets:
        for budget in table.budgets:
            for method in job.methods:
                cells = job.final_cells(dataset, budget, method)
                results = [(cell.seed, read_cell(cell)) for cell in cells]
                if not results or any(result is None for _, result in results):
                    continue
                by_seed = [
                    statistics.mean(float((r or {})["score"]) for s, r in results if s == seed)
                    for seed in table.seeds
                ]
                preset, rate = job.settled(dataset, budget, method)
                rows.append(
                    {
                        "dataset": dataset.name,
                        "budget": budget,
                        "method": method,
                        "mean": statistics.mean(by_seed),
                        "deviation": statistics.stdev(by_seed) if len(by_seed) > 1 else 0.0,
                        "by_seed": by_seed,
                        "values": statistics.mean(
                            float((r or {})["structure_values"]) for _, r in results
                        ),
                        "set_to": f"{preset + ', ' if method == 'manual' else ''}{rate}",
                    }
                )
    return rows


def overlaps(job: SearchTableRun) -> list[tuple[str, str, float]]:
    """How alike searched structures are: Jaccard index over modules, by what differs."""
    table = job.table
    found: list[tuple[str, str, float]] = []
    for budget in table.budgets:
        sets: dict[str, list[set[tuple[str, str]]]] = {}
        for dataset in table.datasets:
            for seed in table.seeds:
                result = read_cell(job.structure_cell(dataset, budget, seed))
                if result is not None:
                    modules = result["structure"]["modules"]
                    chosen = {(m["kind"], m["target"]) for m in modules}
                    sets.setdefault(dataset.name, []).append(chosen)
        names = list(sets)
        for index, one in enumerate(names):
            pairs = [jaccard(a, b) for i, a in enumerate(sets[one]) for b in sets[one][i + 1 :]]
            if pairs:
                found.append((str(budget), f"{one}, seeds", statistics.mean(pairs)))
            for other in names[index + 1 :]:
                pairs = [jaccard(a, b) for a in sets[one] for b in sets[other]]
                found.append((str(budget), f"{one} and {other}", statistics.mean(pairs)))
    return found
