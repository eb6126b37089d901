"""Draw the suite: quality against bytes, a panel a data set, a colour a family of methods.

A line joins the rows that no other beats at fewer bytes: the frontier.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from benchmarks.picture import GRID, INK, MUTED, OURS
from fedpet.utils.formatting import format_bytes

__all__ = ["draw_frontier", "family_of", "frontier"]

Point = tuple[float, float, float]  # bytes, the metric's mean, its deviation

FAMILIES = {  # by how a row's name begins
    "mask": OURS,
    "searched": "#6639ba",
    "random": "#bf8700",
    "manual": "#bf8700",
    "hiwi": "#1a7f37",
    "lora": "#cf222e",
    "ffa-lora": "#cf222e",
    "supertuning": "#953800",
}
OTHERS = "#6e7781"  # full fine-tuning, the head, biases, LayerNorm
LABELLED = 8  # rows of a panel that are all named; of more, those of the line
COLUMNS = 3


def family_of(name: str) -> str:
    """Return the colour of a row."""
    return next((colour for start, colour in FAMILIES.items() if name.startswith(start)), OTHERS)


def frontier(points: Mapping[str, Point]) -> list[str]:
    """Return the rows that no row of as few or fewer bytes beats, the cheapest first.

    Example:
        >>> frontier({"a": (10.0, 0.5, 0.0), "b": (20.0, 0.4, 0.0), "c": (30.0, 0.6, 0.0)})
        ['a', 'c']
    """
    found: list[str] = []
    for name in sorted(points, key=lambda name: (points[name][0], -points[name][1])):
        if not found or points[name][1] > points[found[-1]][1]:
            found.append(name)
    return found


def draw_frontier(
    points: Mapping[str, Mapping[str, Point]],
    references: Mapping[str, Mapping[str, float]],
    path: Path,
) -> None:
    """Write the picture as a PNG, 1800 pixels wide.

    Args:
        points: By data set and row.
        references: By data set: the metric of the probe and of the majority, as lines.
        path: The file.
    """
    from matplotlib.figure import Figure

    names = list(points)
    lines = max(1, -(-len(names) // COLUMNS))
    columns = min(COLUMNS, max(1, len(names)))
    figure = Figure(
        figsize=(9, 2.8 * lines),
        dpi=200,
        layout="constrained",
        facecolor="white",
    )
    panels = figure.subplots(lines, columns, squeeze=False)
    for panel in panels.flat[len(names) :]:
        panel.set_axis_off()
    for panel, name in zip(panels.flat, names, strict=False):
        rows = points[name]
        best = frontier(rows)
        panel.plot(
            [rows[one][0] for one in best], [rows[one][1] for one in best],
            color=MUTED, linewidth=1, zorder=1,
        )  # fmt: skip
        for row, (size, mean, spread) in rows.items():
            panel.errorbar(
                size, mean, yerr=spread, fmt="o", markersize=4, capsize=2, linewidth=1,
                color=family_of(row), zorder=2,
            )  # fmt: skip
            if row in best or len(rows) <= LABELLED:
                panel.annotate(
                    row, (size, mean), xytext=(5, -1), textcoords="offset points",
                    ha="left", va="top", fontsize=5.5, color=INK,
                )  # fmt: skip
        for label, value in references.get(name, {}).items():
            panel.axhline(value, color=GRID, linewidth=0.8, zorder=0)
            panel.annotate(
                label, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                fontsize=5.5, color=MUTED,
            )  # fmt: skip
        panel.set_xscale("log")
        panel.margins(x=0.15, y=0.15)
        panel.xaxis.set_major_formatter(lambda size, _: format_bytes(size))
        panel.set_title(name, fontsize=8, color=INK, loc="left")
        panel.minorticks_off()
        panel.tick_params(colors=MUTED, labelsize=6, length=0)
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color(GRID)
    figure.supxlabel("bytes up and down, all clients and rounds", fontsize=7, color=MUTED)
    figure.savefig(path, metadata={"Software": None})
