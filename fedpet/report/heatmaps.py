"""Where a run trains, layer by layer: the mask's density, and the structure's modules.

In:  grids of cells (fedpet/report/placement.py).
Out: HTML tables whose colour tells how full a cell is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape

from fedpet.report.html import FULLEST, table
from fedpet.report.number_format import show_percent
from fedpet.report.placement import Cell, Grid

__all__ = ["density_map", "structure_map"]


def density_map(grid: Grid) -> str:
    top = max((c.chosen / c.entries for c in grid.cells.values() if c.entries), default=0.0)

    def show(cell: Cell) -> tuple[str, float, str]:
        density = cell.chosen / cell.entries
        words = f"{cell.chosen:,} of {cell.entries:,} entries"
        return show_percent(density), math.sqrt(density / top) if top else 0.0, words

    body = []
    for layer in grid.layers:
        row = [grid.cells[layer, role] for role in grid.roles if (layer, role) in grid.cells]
        everything = Cell(sum(c.entries for c in row), sum(c.chosen for c in row))
        share = show_percent(everything.chosen / everything.entries)
        body.append(_heat_row(grid, layer, show, f'<td class="all">{share}</td>'))
    return table(["layer", *grid.roles, "all"], body, "heat")


def structure_map(grid: Grid) -> str:
    def show(cell: Cell) -> tuple[str, float, str]:
        kinds = " ".join(dict.fromkeys(cell.modules))
        if not cell.gates:
            return kinds, 0.5, ", ".join(cell.modules)
        gate = max(cell.gates)
        return f"{kinds} {gate:.2f}", gate, ", ".join(cell.modules)

    body = [_heat_row(grid, layer, show) for layer in grid.layers]
    return table(["layer", *grid.roles], body, "heat")


def _heat_row(
    grid: Grid, layer: str, show: Callable[[Cell], tuple[str, float, str]], end: str = ""
) -> str:
    """A row of cells; `show` gives a cell's text, its strength in [0, 1], and its full words."""
    cells = []
    for role in grid.roles:
        cell = grid.cells.get((layer, role))
        if cell is None:
            cells.append('<td class="none"></td>')
            continue
        text, strength, words = show(cell)
        share = f"{100 * FULLEST * min(max(strength, 0.0), 1.0):.1f}%"
        cells.append(
            f'<td style="--share: {share}" title="{escape(f"{layer}, {role}: {words}")}">'
            f"{escape(text)}</td>"
        )
    return f'<tr><th scope="row">{escape(layer)}</th>{"".join(cells)}{end}</tr>'
