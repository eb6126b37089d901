"""Count the rows of a split: those used and, by the reason, those left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedpet.data.cache import Entry

__all__ = ["RowBooks", "count_rows"]


@dataclass(frozen=True)
class RowBooks:
    """Counts of a split's rows: those used and those left out add up to those read."""

    read: int
    used: int
    left_out: Mapping[str, int]  # by the reason


_OTHER_PART = {"kept": "held out to evaluate on", "held out": "kept to train on"}


def count_rows(
    entry: Entry, limit: str, more: Mapping[str, int] | None = None, num_rows: int | None = None
) -> RowBooks:
    """Count the rows of a split that are used, and those left out by the reason.

    Args:
        entry: Of the split.
        limit: The setting that limits its rows.
        more: Rows within that limit that are not used, by the reason.
        num_rows: Within that limit; None for all that the entry has.
    """
    told = entry.meta
    num_rows = len(entry.arrays["labels"]) if num_rows is None else num_rows
    left_out = {
        **told["left_out"],
        _OTHER_PART.get(told["part"], ""): told["num_rows"] - told["num_rows_of_part"],
        f"beyond {limit}": told["num_rows_of_part"] - num_rows,
        **(more or {}),
    }
    return RowBooks(
        read=told["num_rows"] + sum(told["left_out"].values()),
        used=num_rows - sum((more or {}).values()),
        left_out={reason: count for reason, count in left_out.items() if count},
    )
