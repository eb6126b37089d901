"""Read a table file, and show what its cells came to."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from benchmarks.central_grid import CentralGrid, Place
from benchmarks.experiment_grid import ExperimentGrid, bytes_of
from benchmarks.grid import Grid, UnsettledError
from benchmarks.table_keys import read_keys
from fedpet.client.node_config import cache_folder
from fedpet.config import Experiment
from fedpet.errors import ConfigError
from fedpet.utils.formatting import format_bytes

Modules = Set[tuple[str, str]]  # kind and target


def read_grid(path: Path, *, data: Path | None = None, **options: Any) -> Grid:
    """Read a table file: of federated runs, or of searched structures where it names data sets.

    Args:
        path: The TOML file.
        data: Folder of the data sets, of searched structures alone.
        options: `say`, `run`, `jobs` and `only` of a `Grid`.

    Raises:
        ConfigError: The file does not read, or would compare unlike with unlike.
    """
    keys = read_keys(path)
    if "datasets" in keys:
        options |= {"data": data or Path(), "cache": cache_folder(Experiment())}
        return CentralGrid.read(keys, path, **options)
    if data is not None:
        raise ConfigError("--data is for tables with [datasets.NAME]; an experiment names its own.")
    return ExperimentGrid.read(keys, path, **options)


def tuning_table(grid: Grid) -> Table:
    """Show the metric at each rate; the chosen one is in bold."""
    title = f"tuned with seed {grid.tune_seed}"
    shown = Table(title=title, title_justify="left", box=None)
    for head in (*_place_heads(grid), "method"):
        shown.add_column(head)
    for _ in range(max(len(method.rates) for method in grid.tuned)):
        shown.add_column("rate: metric", justify="right")
    shown.add_column("")
    for place in grid.places:
        chosen = [grid.settled(method, place) for method in grid.chosen(grid.methods)]
        for method in grid.chosen(grid.tuned):
            texts = []
            for rate, cell in zip(method.rates, grid.tune_cells(method, place), strict=False):
                result = cell.read()
                score = None if result is None else cell.score(result)
                text = f"{rate}: nothing learned" if score is None else f"{rate}: {score:.4f}"
                texts.append(Text(text, style="bold" if (method.name, rate) in chosen else ""))
            edges = {(method.name, rate) for rate in (method.rates[0], method.rates[-1])}
            at_edge = len(texts) > 1 and edges & {*chosen}
            note = "at the edge of its grid" if at_edge else ""
            shown.add_row(*_place_texts(place), method.name, *texts, note)
    return shown


def final_table(grid: Grid) -> RenderableType:
    """Show a row a method: as `fedpet compare`, or beside random ones for structures."""
    if isinstance(grid, CentralGrid) or any(method.structure for method in grid.methods):
        return structures_table(grid)
    from fedpet.report.compare import compare_table
    from fedpet.report.results import read_results

    paths = [cell.path for cell in grid.known_cells("final") if cell.path.exists()]
    return compare_table(read_results(paths))


def structures_table(grid: Grid) -> Table:
    """Show mean and deviation over the seeds, and the difference to random ones, seed by seed."""
    common = _common_rates(grid)
    title = "mean over seeds, deviation; over random: mean, standard error"
    title += f"; all with {' '.join(common)}" if common else ""
    shown = Table(title=title, title_justify="left", box=None)
    central = isinstance(grid, CentralGrid)
    left = (*_place_heads(grid), "structure", "", "set to")
    ends = ("values", "set to") if central else ("values", "search", "training", "rate")
    for head in (*_place_heads(grid), "structure", "metric", "", "over random", "", *ends):
        shown.add_column(head, justify="left" if head in left else "right")
    for place in grid.places:
        rows = summary(grid, place)
        random = next((row["by_seed"] for row in rows if row["method"] == "random"), None)
        for row in rows:
            more = ("", "")
            if random is not None and row["method"] != "random":
                mean, error = over(row["by_seed"], random)
                more = (f"{mean:+.4f}", f"± {error:.4f}")
            sent = [format_bytes(row[key]) if row[key] else "" for key in ("search", "training")]
            shown.add_row(
                *_place_texts(place),
                row["method"],
                f"{row['mean']:.4f}",
                f"± {row['deviation']:.4f}",
                *more,
                f"{row['values']:,.0f}",
                *([] if central else sent),
                " ".join(part for part in row["set_to"].split() if part not in common),
            )
    return shown


def summary(grid: Grid, place: Any = None) -> list[dict[str, Any]]:
    """Return a row for each method of a place whose final cells are all there.

    A seed's metric is the mean over its structures.
    """
    rows = []
    for method in grid.methods:
        try:
            how, rate = grid.settled(method, place)
        except UnsettledError:
            continue
        read = [(cell, cell.read()) for cell in grid.final_cells(method, place)]
        done = [(cell, result) for cell, result in read if result is not None]
        if not done or len(done) < len(read):
            continue
        by_seed = [
            statistics.mean(cell.score(r) or 0.0 for cell, r in done if cell.seed == seed)
            for seed in grid.seeds
        ]
        row = {
            "method": method.name,
            "mean": statistics.mean(by_seed),
            "deviation": statistics.stdev(by_seed) if len(by_seed) > 1 else 0.0,
            "by_seed": by_seed,
            "values": statistics.mean(float(_structure_values(r)) for _, r in done),
            "set_to": f"{how}, {rate}" if len(method.rates_of) > 1 else str(rate),
        }
        for kind in ("search", "training"):
            sent = [bytes_of(r, kind) for _, r in done if "communication" in r]
            row[kind] = statistics.mean(sent) if sent else 0
        rows.append(row)
    return rows


def overlaps(grid: Grid) -> list[tuple[str, float]]:
    """Return how alike structures are: mean Jaccard index of their modules, by what is compared."""
    found: list[tuple[str, float]] = []
    if isinstance(grid, CentralGrid):
        for budget in grid.budgets:
            sets = {
                dataset.name: [
                    (seed, modules)
                    for seed in grid.seeds
                    for modules in _modules(grid.structure_cell(Place(dataset, budget), seed))
                ]
                for dataset in grid.datasets
            }
            pairs = _alike(sets, same_seed=False)
            found += [(f"{what} at {budget}", share) for what, share in pairs]
        return found
    sets = {
        method.name: [
            (cell.seed, modules) for cell in grid.final_cells(method) for modules in _modules(cell)
        ]
        for method in grid.methods
    }
    return list(_alike(sets, same_seed=True))


def over(scores: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Return the difference of two methods seed by seed: mean and standard error."""
    more = [a - b for a, b in zip(scores, others, strict=True)]
    error = statistics.stdev(more) / len(more) ** 0.5 if len(more) > 1 else 0.0
    return statistics.mean(more), error


def jaccard(one: Set[Any], other: Set[Any]) -> float:
    """Return the common share of two sets; 0 where both are empty."""
    return len(one & other) / max(1, len(one | other))


def _alike(
    sets: dict[str, list[tuple[int, Modules]]], *, same_seed: bool
) -> Iterator[tuple[str, float]]:
    """Compare within a name structures of different seeds, and between names those of one seed.

    Args:
        sets: Seed and modules of each structure, by name.
        same_seed: Whether names are compared seed by seed, or every seed with every other.
    """
    names = list(sets)
    for index, one in enumerate(names):
        for other in names[index:]:
            shares = [
                jaccard(a, b)
                for first, a in sets[one]
                for second, b in sets[other]
                if (first < second if one == other else first == second or not same_seed)
            ]
            if shares:
                what = f"{one}, seeds" if one == other else f"{one} and {other}"
                yield what, statistics.mean(shares)


def _modules(cell: Any) -> Iterator[Modules]:
    result = cell.read()
    if result is not None and "structure" in result:
        yield {(module["kind"], module["target"]) for module in result["structure"]["modules"]}
    elif result is not None and "modules" in result:
        yield {(kind, target) for kind, target in result["modules"]}


def _structure_values(result: dict[str, Any]) -> int:
    return int(result.get("model", result)["structure_values"])


def _common_rates(grid: Grid) -> list[str]:
    """Return the rates of kinds of module that all points of all grids share: "head=0.005"."""
    parts = [str(rate).split() for method in grid.tuned for rate in method.rates]
    return [part for part in parts[0] if "=" in part and all(part in other for other in parts)]


def _place_heads(grid: Grid) -> tuple[str, ...]:
    return ("data", "budget") if isinstance(grid, CentralGrid) else ()


def _place_texts(place: Any) -> tuple[str, ...]:
    return (place.dataset.name, str(place.budget)) if isinstance(place, Place) else ()
