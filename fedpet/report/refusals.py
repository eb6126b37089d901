"""Refused replies counted: how often which node gave which reason.

In:  the refusals of `result.json`, one a client and round.
Out: one `Count` for each node and reason, the most frequent first.

What differs from round to round within one reason, such as the number of a round, is left open, so
that a node which is wrong in the same way for twenty rounds is one line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Count", "count_refusals"]

_NODE = re.compile(r"^node [^ :]+: ")
_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,.]*(?<![.,])(?![\w])")


@dataclass(frozen=True)
class Count:
    """One way of being refused.

    Attributes:
        node: Its name, or Flower's id, or "" where none is known.
        reason: As the first of them has it; where the others have other numbers, "…" for those.
        times: How many replies.
        clients: Their names, in order.
        rounds: When, rising, each round once.
    """

    node: str
    reason: str
    times: int
    clients: tuple[str, ...]
    rounds: tuple[int, ...]


def count_refusals(refused: Iterable[Mapping[str, Any]]) -> list[Count]:
    """Group refusals by node and reason; the most frequent come first."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for entry in refused:
        reason = _NODE.sub("", str(entry["reason"]))
        key = str(entry.get("node", "")), _NUMBER.sub("…", reason)
        groups.setdefault(key, []).append({**entry, "reason": reason})
    counts = [
        Count(
            node,
            entries[0]["reason"] if len({e["reason"] for e in entries}) == 1 else pattern,
            len(entries),
            tuple(sorted({str(entry["who"]) for entry in entries})),
            tuple(sorted({int(entry["round"]) for entry in entries})),
        )
        for (node, pattern), entries in groups.items()
    ]
    return sorted(counts, key=lambda count: (-count.times, count.node, count.reason))
