"""Show what clients measured on their own rows: a curve by round, and a table of the spread.

In:  "on_clients" of `result.json`.
Out: parts of a run's page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from fedpet.report.plots import Series, panels_svg

__all__ = ["client_spread"]

NAMES = {
    "before": "the global values, as clients received them",
    "after": "each client's own values, after its training",
    "seen": "the last values, clients of training",
    "unseen": "clients that never train",
}
COLOURS = {"before": "series-0", "after": "series-2", "seen": "series-0", "unseen": "series-1"}


def client_spread(quality: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return plot, heads and rows; None where clients measured nothing."""
    found: Mapping[str, Sequence[Mapping[str, Any]]] = quality.get("on_clients") or {}
    if not found:
        return None
    metric = quality["metric"]
    panels = {
        f"{metric}, mean by rows": _series(found, "row_mean"),
        f"{metric}, worst tenth of the clients": _series(found, "worst_decile"),
    }
    return {
        "plot": Markup(panels_svg(panels, prefix="clients")),
        "legend": [(COLOURS[name], NAMES[name]) for name in NAMES if name in found],
        "heads": [
            *("", "values of round", "clients", "rows", "mean by rows", "mean by clients"),
            *("worst tenth", "worst", "best"),
        ],
        "rows": [
            (NAMES.get(name, name), str(spread["round"]), *_cells(spread))
            for name, spreads in found.items()
            for spread in (*spreads[:1], *spreads[1:][-1:])  # the first and the last
        ],
        "all": [
            (NAMES.get(name, name), str(spread["round"]), *_cells(spread))
            for name, spreads in found.items()
            for spread in spreads
        ],
    }


def _series(found: Mapping[str, Sequence[Mapping[str, Any]]], figure: str) -> list[Series]:
    return [
        (
            name,
            COLOURS[name],
            [(spread["round"], spread[figure]) for spread in found[name] if figure in spread],
        )
        for name in NAMES
        if name in found
    ]


def _cells(spread: Mapping[str, Any]) -> tuple[str, ...]:
    if "row_mean" not in spread:
        return ("0", *["–"] * 6)
    figures = ("row_mean", "mean", "worst_decile", "worst", "best")
    return (
        f"{spread['clients']:,}",
        f"{spread['rows']:,}",
        *(f"{spread[name]:.4f}" for name in figures),
    )
