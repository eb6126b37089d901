"""Draw quality against bytes: a point a method, its seeds as an error bar, bytes on a log axis.

An arrow joins the rows that differ in their codec alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedpet.report.comparison import Row
from fedpet.utils.formatting import format_bytes

__all__ = ["draw_quality_by_bytes"]

INK, MUTED, GRID = "#1b1f24", "#57606a", "#d8dee4"
OURS, OTHERS = "#0b61b3", "#8b949e"


def draw_quality_by_bytes(
    rows: Sequence[Row], names: dict[str, str], path: Path, *, labelled_above: str
) -> None:
    """Write the picture as a PNG of 1600 x 800 pixels.

    Args:
        rows: One a method, each with more than one seed.
        names: Labels of the methods; those that begin with "fedpet" are in fedpet's colour.
        path: The file.
        labelled_above: The method whose label stands above its point; the others' stand below.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), dpi=200, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    by_name = {row.group.name: row for row in rows}
    for name, row in by_name.items():
        colour = OURS if names[name].startswith("fedpet") else OTHERS
        axes.errorbar(
            row.total_bytes, row.mean, yerr=row.deviation,
            fmt="o", markersize=8, capsize=4, linewidth=1.5, color=colour,
        )  # fmt: skip
        above = name == labelled_above
        edge = row.mean + (row.deviation or 0) * (1 if above else -1)
        axes.annotate(
            f"{names[name]}\n{row.mean:.3f}, {format_bytes(row.total_bytes)}",
            (row.total_bytes, edge),
            xytext=(0, 6 if above else -6),
            textcoords="offset points",
            ha="center",
            va="bottom" if above else "top",
            fontsize=8,
            color=INK,
        )  # fmt: skip
    axes.set_xscale("log")
    sizes = [row.total_bytes for row in rows]
    axes.set_xlim(min(sizes) / 3, max(sizes) * 3)
    low = min(row.mean - (row.deviation or 0) for row in rows)
    axes.set_ylim(low - 0.05, max(row.mean + (row.deviation or 0) for row in rows) + 0.03)
    axes.xaxis.set_major_formatter(lambda size, _: format_bytes(size))
    axes.set_xlabel("bytes up and down, all clients and rounds", color=MUTED, fontsize=9)
    axes.set_ylabel("accuracy", color=MUTED, fontsize=9)
    axes.minorticks_off()
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.tick_params(colors=MUTED, labelsize=8, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    figure.savefig(path)
