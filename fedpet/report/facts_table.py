"""Lay out names and values in sections below a title, as the tables of a run and an estimate do."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.table import Table
from rich.text import Text

__all__ = ["facts_table"]


def facts_table(title: str, sections: Iterable[Iterable[tuple[str, str]]]) -> Table:
    """Return a table of two columns; an empty section leaves no gap."""
    table = Table(
        title=Text(title, style="bold", no_wrap=True, overflow="ignore"),  # a path stays whole
        title_justify="left",
        box=box.SIMPLE,
        show_edge=False,
        show_header=False,
        pad_edge=False,
    )
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for section in sections:
        rows = list(section)
        for name, value in rows:
            table.add_row(Text(name), Text(value))
        if rows:
            table.add_section()
    return table
