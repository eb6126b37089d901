"""Draw the plots of a report by matplotlib: as SVG that follows the page's theme, and as PNG.

In:  curves and rounds.
Out: SVG text for a page, in two shapes (wide, narrow), or a PNG file.

matplotlib writes colours into the file. For the page each is a stand-in that is afterwards
exchanged for a CSS variable, so that one drawing serves light and dark; text stays text.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from fedpet.report.curves import KINDS, Curve, Point, with_measuring
from fedpet.utils.formatting import format_bytes

__all__ = ["Line", "bytes_svg", "metric_png", "metric_svg", "panels_svg", "progress_svg"]

Series = tuple[str, str, Sequence[tuple[int, float]]]  # name, variable of its colour, points

SERIES = 7  # colours of lines; beyond them the marker changes
MARKERS = "osD"  # round, square, diamond: as the swatches of the page
# Inches at 72 a unit: what a column of the page, and a telephone, are wide.
WIDE, NARROW = (10.0, 4.4), (4.3, 3.9)
FEW_POINTS = 40  # up to here each point has a marker
LEGEND_CHARACTERS = 95  # of a legend's line, swatches counted as six each
LOG_FROM = 30  # totals further apart than this need a logarithmic axis

_STAND_INS = {
    name: f"#fe{index:02x}dc"
    for index, name in enumerate(
        ["ink", "muted", "grid", "surface", "up", "down", "plan"]
        + [f"series-{number}" for number in range(SERIES)]
    )
}
# A PNG is seen on white.
_PRINTED = {
    "ink": "#1b1f24",
    "muted": "#59636e",
    "grid": "#dfe3e8",
    "surface": "#ffffff",
    "series-0": "#0b62b0",
    "series-1": "#c2500a",
    "series-2": "#12805c",
    "series-3": "#8a4fb3",
    "series-4": "#8a6500",
    "series-5": "#b3306b",
    "series-6": "#59636e",
}
_SENT = "bytes up and down with the plan, all clients"
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedpet",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "path.simplify": False,
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Line:
    """One run in the plot of the metric. Runs of one group share a number."""

    name: str  # of the run: "fedpet, seed 1"
    group: str  # in the legend
    number: int  # of the group: its colour and marker
    curve: Curve
    main: bool  # the run that the report is about


def metric_svg(lines: Sequence[Line], metric: str, *, prefix: str) -> str:
    """Draw the metric against cumulative bytes; wide and narrow, the page shows one of them.

    Args:
        lines: The runs; the last drawn lies on top.
        metric: Its name.
        prefix: Begins every id in the SVG; different for each plot of a page.
    """
    parts = []
    for shape, size in {"wide": WIDE, "narrow": NARROW}.items():
        with matplotlib.rc_context(_SETTINGS):
            figure = Figure(figsize=size, layout="constrained")
            _draw_metric(figure.add_subplot(), lines, metric, _STAND_INS)
            titles = {
                _gid(index): [_told(line, point, metric) for point in line.curve.points]
                for index, line in enumerate(lines)
            }
            label = f"{metric} against {_SENT}"
            parts.append(_to_svg(figure, f"{prefix}-{shape}", shape, label, titles))
    return "\n".join(parts)


def progress_svg(rounds: Sequence[Mapping[str, Any]], metric: str, *, prefix: str) -> str:
    """Draw the training loss and the metric by round: beside each other, or narrow, stacked."""
    found = {
        "training loss": ("series-1", _finite(rounds, "loss")),
        metric: ("series-0", _finite(rounds, "metric")),
    }
    panels = {name: [(name, *line)] for name, line in found.items()}
    return panels_svg(panels, prefix=prefix)


def panels_svg(panels: Mapping[str, Sequence[Series]], *, prefix: str) -> str:
    """Draw lines by round, in panels beside each other, or narrow, stacked; "" without a point.

    Args:
        panels: The lines of each, by its title: name, variable of the colour, rounds and values.
        prefix: Begins every id in the SVG; different for each plot of a page.
    """
    drawn = {title: [one for one in series if one[2]] for title, series in panels.items()}
    drawn = {title: series for title, series in drawn.items() if series}
    if not drawn:
        return ""
    parts = []
    for shape, size in {"wide": (WIDE[0], 3.4), "narrow": (NARROW[0], 4.6)}.items():
        with matplotlib.rc_context(_SETTINGS):
            figure = Figure(figsize=size, layout="constrained")
            grid = (1, len(drawn)) if shape == "wide" else (len(drawn), 1)
            titles: dict[str, list[str]] = {}
            for panel, (title, series) in enumerate(drawn.items()):
                axes = figure.add_subplot(*grid, panel + 1)
                for name, colour, points in series:
                    gid = _gid(len(titles))
                    _draw_rounds(axes, title, _STAND_INS[colour], points, gid)
                    titles[gid] = [f"round {n}: {name} {value:.4f}" for n, value in points]
            label = f"{' and '.join(drawn)} by round"
            parts.append(_to_svg(figure, f"{prefix}-{shape}", shape, label, titles))
    return "\n".join(parts)


def _finite(rounds: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """Return the rounds of training with a finite number, and that number."""
    return [
        (record["round"], float(record[key]))
        for record in rounds
        if record.get("kind", "training") == "training"
        and record.get(key) is not None
        and math.isfinite(record[key])
    ]


def _draw_rounds(
    axes: Axes, name: str, colour: str, points: Sequence[tuple[int, float]], gid: str
) -> None:
    _style(axes, _STAND_INS)
    numbers, values = zip(*points, strict=True)
    axes.plot(
        numbers,
        values,
        color=colour,
        linewidth=2,
        marker="o",
        markersize=4.5,
        markeredgecolor=_STAND_INS["surface"],
        markeredgewidth=0.6,
        gid=gid,
        clip_on=False,
        zorder=3,
    )
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("round", color=_STAND_INS["muted"])
    _title(axes, name, _STAND_INS["ink"])


def metric_png(lines: Sequence[Line], metric: str, path: Path) -> None:
    """Write the main plot, with a legend, on white."""
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(8.0, 4.5), layout="constrained", facecolor="white")
        axes = figure.add_subplot()
        _draw_metric(axes, lines, metric, _PRINTED)
        if len({line.group for line in lines}) > 1:
            drawn = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
            names = [line.group for line in sorted(lines, key=lambda line: line.number)]
            names = list(dict.fromkeys(name for name in names if name in drawn))
            figure.legend(
                [drawn[name] for name in names],
                names,
                loc="outside upper left",
                ncols=max(1, min(5, LEGEND_CHARACTERS // (max(map(len, names)) + 6))),
                frameon=False,
                labelcolor=_PRINTED["ink"],
            )
        FigureCanvasAgg(figure)
        figure.savefig(path, dpi=200, metadata={"Software": "fedpet"})


def bytes_svg(rounds: Sequence[Mapping[str, Any]], *, prefix: str) -> str:
    """Bytes of each round, stacked by kind; wide and narrow."""
    rounds = with_measuring([record for record in rounds if record["round"] > 0])
    parts = []
    for shape, size in {"wide": (WIDE[0], 3.4), "narrow": NARROW}.items():
        with matplotlib.rc_context(_SETTINGS):
            figure = Figure(figsize=size, layout="constrained")
            titles = _draw_bytes(figure.add_subplot(), rounds)
            label = "bytes of each round, by kind"
            parts.append(_to_svg(figure, f"{prefix}-{shape}", shape, label, titles))
    return "\n".join(parts)


def _draw_metric(
    axes: Axes, lines: Sequence[Line], metric: str, colours: Mapping[str, str]
) -> None:
    _style(axes, colours)
    totals = [line.curve.points[-1].both for line in lines if line.curve.points]
    totals = [total for total in totals if total > 0]
    logarithmic = bool(totals) and max(totals) > LOG_FROM * min(totals)
    order = sorted(range(len(lines)), key=lambda index: lines[index].main)  # the main run on top
    named: set[str] = set()
    for index in order:
        line = lines[index]
        points = [p for p in line.curve.points if not logarithmic or p.both > 0]
        if not points:
            continue
        colour = colours[f"series-{line.number % SERIES}"]
        marker = MARKERS[line.number // SERIES % len(MARKERS)]
        few = len(points) <= FEW_POINTS
        axes.plot(
            [point.both for point in points],
            [point.metric for point in points],
            color=colour,
            linewidth=2.4 if line.main else 1.4,
            linestyle="-" if line.curve.exact else (0, (4, 2)),
            marker=marker,
            markersize=5 if line.main else 4,
            markevery=None if few else [-1],
            markeredgecolor=colours["surface"],
            markeredgewidth=0.6,
            label="_" if line.group in named else line.group,
            gid=_gid(index),
            zorder=4 if line.main else 3,
            solid_joinstyle="round",
            clip_on=False,
        )
        named.add(line.group)
    if logarithmic:
        _logarithmic(axes, lines, colours)
    else:
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value)))
    axes.set_xlabel(f"{_SENT}{', log scale' if logarithmic else ''}", color=colours["muted"])
    _title(axes, metric, colours["ink"])


def _logarithmic(axes: Axes, lines: Sequence[Line], colours: Mapping[str, str]) -> None:
    """Make the axis logarithmic; it has no zero, so the start is a level across the plot."""
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_xlim()
    decades = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    axes.xaxis.set_major_locator(FixedLocator([10.0**power for power in decades]))
    start = next((line.curve.points[0] for line in lines if line.main and line.curve.points), None)
    if start is not None and start.both == 0:
        axes.axhline(start.metric, color=colours["muted"], linewidth=1, linestyle=(0, (1, 3)))
        axes.annotate(
            "before training",
            (0.995, start.metric),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            va="bottom",
            color=colours["muted"],
            fontsize=9,
        )


def _numbered(rounds: Sequence[Mapping[str, Any]]) -> tuple[list[int], dict[int, str]]:
    """Return each round's place on the axis, a search's before 1, and its name."""
    before = sum(record.get("kind") == "search" for record in rounds)
    names: dict[int, str] = {}
    for record in rounds:
        is_search = record.get("kind") == "search"
        number = record["round"] - (before if is_search else 0)
        names[number] = f"{'search ' if is_search else ''}round {record['round']}"
    return list(names), names


def _draw_bytes(axes: Axes, rounds: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    _style(axes, _STAND_INS)
    numbers, names = _numbered(rounds)
    below = [0.0] * len(rounds)
    titles: dict[str, list[str]] = {}
    for kind, name in zip(KINDS, ("up", "down", "plan"), strict=True):
        heights = [float(record[kind]) for record in rounds]
        bars = axes.bar(
            numbers,
            heights,
            bottom=below,
            width=0.8,
            color=_STAND_INS[name],
            edgecolor=_STAND_INS["surface"],
            linewidth=0.5 if len(rounds) <= 100 else 0,
        )
        for number, bar, height in zip(numbers, bars, heights, strict=True):
            bar.set_gid(f"bar-{name}-{number}")
            words = f"{names[number]}, {name}: {format_bytes(height)}"
            titles[f"bar-{name}-{number}"] = [words]
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value)))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
    if numbers:
        axes.set_ylim(0, 1.06 * max(below) or 1)
        axes.set_xlim(min(numbers) - 0.6, max(numbers) + 0.6)
    axes.set_xlabel("round", color=_STAND_INS["muted"])
    _title(axes, "bytes a round, all clients", _STAND_INS["ink"])
    return titles


def _title(axes: Axes, text: str, colour: str) -> None:
    axes.set_title(text, loc="left", color=colour, fontsize=11, fontweight="bold")


def _style(axes: Axes, colours: Mapping[str, str]) -> None:
    axes.set_facecolor("none")
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=colours["grid"], linewidth=0.8)
    axes.tick_params(axis="both", colors=colours["muted"], length=0, labelcolor=colours["muted"])
    axes.spines["bottom"].set_color(colours["muted"])


def _gid(index: int) -> str:
    return f"line-{index}"


def _told(line: Line, point: Point, metric: str) -> str:
    return (
        f"{line.name}, round {point.round}: {metric} {point.metric:.4f} after "
        f"{format_bytes(point.both)}"
    )


def _to_svg(
    figure: Figure, prefix: str, shape: str, label: str, titles: Mapping[str, Sequence[str]]
) -> str:
    """Return the figure as an `svg` element for an HTML page."""
    figure.patch.set_alpha(0)
    FigureCanvasSVG(figure)
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    head = f'<svg class="{shape}" role="img" aria-label="{escape(label)}" {box[0]}>'
    text = re.sub(r"^<svg[^>]*>", head, text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r"font: ([\w ]*?)([\d.]+px) [^;\"]*", r"font-size: \2; font-weight: \1", text)
    text = text.replace("font-weight: ;", "").replace('font-weight: "', '"')
    for name, colour in _STAND_INS.items():
        text = text.replace(colour, f"var(--{name})")
    for gid, words in titles.items():
        text = _with_titles(text, gid, words)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(xlink:href="|url\()#', rf"\1#{prefix}-", text)
    return re.sub(r"\n\s*", "\n", text).strip()


def _with_titles(text: str, gid: str, titles: Sequence[str]) -> str:
    """Give what is drawn under an id its words: a browser shows them under the pointer."""
    start = text.find(f'<g id="{gid}">')
    if start < 0:
        return text
    end = _end_of_group(text, start)
    group = text[start:end]
    if len(titles) == 1 and "<use" not in group:
        group = group.replace(">", f"><title>{escape(titles[0])}</title>", 1)
    elif group.count("<use") in (len(titles), len(titles) - 1):
        # on a logarithmic axis the point before training is not drawn
        words = itertools.islice(titles, len(titles) - group.count("<use"), None)
        group = re.sub(
            r"(<use [^>]*?)\s*/>",
            lambda match: f"{match[1]}><title>{escape(next(words))}</title></use>",
            group,
        )
    return text[:start] + group + text[end:]


def _end_of_group(text: str, start: int) -> int:
    depth = 0
    for match in re.finditer(r"<g\b|</g>", text[start:]):
        depth += 1 if match[0] == "<g" else -1
        if depth == 0:
            return start + match.end()
    return len(text)
