"""Show runs side by side in the terminal: a line a method, averaged over its seeds.

In:  results (fedpet/report/results.py).
Out: a Rich table an experiment: quality, and bytes, beside full fine-tuning and dense FedAvg.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from fedpet.report.comparison import Column, Row, columns_of, compare_rows, notes

__all__ = ["compare_table"]


def compare_table(results: Sequence[dict[str, Any]]) -> RenderableType:
    """Show what `read_results` gives: a table an experiment, cheapest last."""
    rows = compare_rows(results)
    parts: list[RenderableType] = []
    for question in dict.fromkeys(row.group.question for row in rows):
        chosen = [row for row in rows if row.group.question == question]
        parts += [*([""] if parts else []), _Fitting(chosen), *map(_Note, notes(chosen))]
    return Group(*parts)


@dataclass(frozen=True)
class _Note:
    """Return a sentence below a table, broken between words alone: a path stays whole."""

    text: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        for line in wrap(self.text, width, break_long_words=False, break_on_hyphens=False):
            yield Text(line, no_wrap=True, overflow="ignore")


@dataclass(frozen=True)
class _Fitting:
    """One experiment's table: a line a row where there is room, else two."""

    rows: Sequence[Row]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = _table(self.rows, stacked=False)
        needed = Measurement.get(console, options.update(width=1000), wide).maximum
        yield wide if needed <= options.max_width else _table(self.rows, stacked=True)


def _table(rows: Sequence[Row], *, stacked: bool) -> Table:
    columns = columns_of(rows, "\n" if stacked else " ")
    if stacked:
        columns = _stacked(columns)
    table = Table(
        title=Text(rows[0].group.title, style="bold", no_wrap=True, overflow="ignore"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        header_style="none",
    )
    table.add_column("method", style="cyan", overflow="fold")
    for header, _ in columns:
        table.add_column(Text(header), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(Text(row.group.name), *(Text(show(row)) for _, show in columns))
    return table


def _stacked(columns: Sequence[Column]) -> list[Column]:
    """Up above down; and the ratio to full fine-tuning, where there is one, above that to dense."""
    stacked = list(columns)
    if "full" in columns[-2][0]:
        stacked[-2:] = [_over("of full,\nof dense", columns[-2], columns[-1])]
    up = next(i for i, (heading, _) in enumerate(columns) if heading.startswith("up,"))
    stacked[up : up + 2] = [_over("up, down,\na round", columns[up], columns[up + 1])]
    return stacked


def _over(heading: str, upper: Column, lower: Column) -> Column:
    """Two columns as one, the one above the other."""
    return heading, lambda row: f"{upper[1](row)}\n{lower[1](row)}"
