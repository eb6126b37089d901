"""Pieces of HTML that every part of a page is made of."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from fedpet.report.plots import SERIES

__all__ = ["FULLEST", "section", "swatch", "swatch_of", "table"]

# How much of a cell's colour the fullest cell has: text on it must stay readable.
FULLEST = 0.6


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title[:1].upper() + title[1:])}</h2>{''.join(parts)}</section>"


def table(heads: Iterable[str], body: Iterable[str], kind: str = "") -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    name = f' class="{kind}"' if kind else ""
    return (
        f'<div class="scroll" tabindex="0"><table{name}><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def swatch(variable: str, shape: str = "square") -> str:
    return f'<span class="swatch {shape}" style="--colour: var(--{variable})"></span>'


def swatch_of(number: int) -> str:
    """Colour and marker of a group, as the plots have them."""
    shapes = ("round", "square", "diamond")
    return swatch(f"series-{number % SERIES}", shapes[number // SERIES % len(shapes)])
