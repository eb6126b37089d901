"""Read a run's ledger: the bytes sent by the time the metric was measured.

In:  a result, with `rounds.jsonl` beside it where it lies in a run folder.
Out: a `Curve`, the metric against cumulative bytes, and the rounds' own lines.

The books are checked before they are shown: the rounds must add up to the result.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpet.errors import InputError

__all__ = ["Curve", "read_curve", "read_rounds", "with_measuring"]

KINDS = ("uplink_bytes", "downlink_bytes", "plan_bytes")
_WANTED = ("round", "metric", *KINDS)


@dataclass(frozen=True)
class Point:
    """The metric after a round, and the bytes of all clients up to then."""

    round: int
    metric: float
    up: float
    down: float  # the plan included

    @property
    def both(self) -> float:
        """Up and down."""
        return self.up + self.down


@dataclass(frozen=True)
class Curve:
    """The metric against what was sent."""

    points: tuple[Point, ...]
    exact: bool  # False where bytes by round are not known and are spread evenly


def read_rounds(result: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Read `rounds.jsonl` beside a result.

    Args:
        result: As `read_results` gives it, with its "path".

    Returns:
        A dict a round, round 0 first, or None where no such file lies beside it.

    Raises:
        InputError: The file does not read, or does not add up to the result.
    """
    path = Path(result["path"])
    file = path.parent / "rounds.jsonl"
    if path.name != "result.json" or not file.is_file():
        return None
    rounds = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{str(file)!r} cannot be read: {error}.") from None
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            missing = [name for name in _WANTED if name not in record]
        except (ValueError, TypeError):
            missing = ["all keys: it is no JSON object"]
        if missing:
            raise InputError(
                f"line {number} of {str(file)!r} lacks {', '.join(missing)}: the file was not "
                "written by a run of this version."
            )
        rounds.append(record)
    for kind in KINDS:
        stated, added = result["communication"].get(kind), sum(record[kind] for record in rounds)
        if stated != added:
            raise InputError(
                f"the rounds of {str(file)!r} add up to {added:,} {kind}, result.json beside it "
                f"says {stated!r}: they are not of one run."
            )
    return rounds


def read_curve(result: Mapping[str, Any]) -> Curve:
    """Return the metric against cumulative bytes, from the rounds, else from the totals."""
    rounds = read_rounds(result)
    if rounds is not None:
        return Curve(_points(rounds), exact=True)
    sent, measured = result["communication"], result["quality"]["by_round"]
    last = max((point["round"] for point in measured), default=0)
    down = sent["downlink_bytes"] + sent["plan_bytes"]
    points = tuple(
        Point(
            point["round"],
            point["value"],
            sent["uplink_bytes"] * (point["round"] / last if last else 1.0),
            down * (point["round"] / last if last else 1.0),
        )
        for point in measured
        if _is_number(point["value"])
    )
    return Curve(points, exact=False)


def with_measuring(rounds: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Add the bytes of lines of evaluation to those of the round that each follows."""
    joined: list[Mapping[str, Any]] = []
    for record in rounds:
        if record.get("kind") == "evaluation" and joined:
            both = {kind: joined[-1][kind] + record[kind] for kind in KINDS}
            joined[-1] = {**joined[-1], **both}
        elif record.get("kind") != "evaluation":
            joined.append(record)
    return joined


def _points(rounds: Sequence[Mapping[str, Any]]) -> tuple[Point, ...]:
    """Return the server's evaluations; where it has no rows, what the clients measured."""
    points = []
    up = down = 0
    on_server = any(record["metric"] is not None for record in rounds)
    for record in rounds:
        earlier = up, down  # clients measure, before they train, what the round before came to
        up += record["uplink_bytes"]
        down += record["downlink_bytes"] + record["plan_bytes"]
        if on_server and _is_number(record["metric"]):
            points.append(Point(record["round"], record["metric"], up, down))
        found = {} if on_server else record.get("on_clients", {})
        if "row_mean" in (before := found.get("before", {})):
            points.append(Point(record["round"] - 1, before["row_mean"], *earlier))
        if "row_mean" in (seen := found.get("seen", {})):
            points.append(Point(record["round"], seen["row_mean"], up, down))
    return tuple(points)


def _is_number(metric: float | None) -> bool:
    """Return True for a metric that was measured and is not NaN."""
    return metric is not None and math.isfinite(metric)
