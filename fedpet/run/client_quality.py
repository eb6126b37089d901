"""Gather what clients measured, round by round, from the books of a run.

In:  the ledger: the metrics in training's frames, and those of lines of the kind "evaluation".
Out: "on_clients" of `result.json`; and, where the server has no rows, the run's own metric.

What clients measure before they train in a round are the values after the round before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedpet.protocol.ledger import EVALUATION, TRAINING, Ledger
from fedpet.training.metrics import Assessment, greater_is_better

__all__ = ["KeptRound", "client_evaluations", "final_on_clients", "metric_on_clients"]

AFTER_LAST, UNSEEN = "seen", "unseen"  # names in a line of evaluation
NAMES = ("before", "after", AFTER_LAST, UNSEEN)


@dataclass(frozen=True)
class KeptRound:
    """The best round so far.

    Attributes:
        server_round: The round that the values came of, from 1.
        metric: Of these values.
        values: float32, (num_values,).
    """

    server_round: int
    metric: float
    values: np.ndarray

    @classmethod
    def better(
        cls,
        held: KeptRound | None,
        server_round: int,
        value: float | None,
        values: np.ndarray,
        metric: str,
    ) -> KeptRound | None:
        """Return the better of two rounds, of equal ones the earlier; no round without a number."""
        if value is None or not math.isfinite(value) or server_round < 1:
            return held
        sign = 1 if greater_is_better(metric) else -1
        if held is not None and sign * value <= sign * held.metric:
            return held
        return cls(server_round, value, values.copy())


def client_evaluations(ledger: Ledger) -> dict[str, list[dict[str, Any]]]:
    """Return the spreads over clients by name, each with the round that its values are of."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES}
    for record in ledger.rounds:
        if record.kind not in (TRAINING, EVALUATION):
            continue
        for name, spread in record.on_clients.items():
            number = record.round - 1 if name == "before" else record.round
            found[name].append({"round": number, **spread})
    return {name: spreads for name, spreads in found.items() if spreads}


def metric_on_clients(ledger: Ledger) -> list[tuple[int, float]]:
    """Return rounds, and the clients' mean weighted by rows of the values after each."""
    return [*_measured(ledger)]


def _measured(ledger: Ledger) -> Iterator[tuple[int, float]]:
    found = client_evaluations(ledger)
    for spread in (*found.get("before", ()), *found.get(AFTER_LAST, ())):
        if "row_mean" in spread:
            yield spread["round"], spread["row_mean"]


def final_on_clients(ledger: Ledger, metric: str, server_round: int) -> Assessment:
    """Return the clients' mean of the values after a round, in the place of the server's.

    Args:
        ledger: The books.
        metric: Its name.
        server_round: Whose values are kept; where nobody measured those, the last that somebody
            did. The metric is NaN where nobody ever did.
    """
    measured = dict(metric_on_clients(ledger))
    value = measured.get(server_round, next(reversed(measured.values()), math.nan))
    return Assessment(value, metrics={metric: value})
