"""Check clients' metrics, and sum them up: their means, and the worst tenth.

In:  a `ClientMetric` a client, each a stranger's word until it is checked.
Out: the spread over clients of a round. Nothing in it names a client.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedpet.config import ClientEvaluation
from fedpet.errors import FrameError
from fedpet.protocol.client_metric import ClientMetric
from fedpet.training.metrics import greater_is_better

__all__ = ["checked_metric", "spread_of", "spreads_of"]

# What a metric can be; of one that is not here, a user's, any finite number.
_FRACTIONS = (
    *("accuracy", "f1", "macro_f1", "weighted_f1", "balanced_accuracy"),
    *("token_accuracy", "exact_match"),
)
RANGES: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(_FRACTIONS, (0.0, 1.0)),
    **dict.fromkeys(("matthews", "pearson"), (-1.0, 1.0)),
    **dict.fromkeys(("mae", "loss"), (0.0, math.inf)),
    "perplexity": (1.0, math.inf),
}


def checked_metric(
    found: ClientMetric,
    metric: str,
    rule: ClientEvaluation | None,
    most_rows: int,
    *,
    grows: bool,
    alone: bool = False,
) -> ClientMetric:
    """Hold a client's metric against what was asked for.

    Args:
        found: As it was read.
        metric: Its name.
        rule: The plan's; None asks for none.
        most_rows: That the client can have measured, by what it registered.
        grows: A client's rows may have grown since: more count as `most_rows`.
        alone: It answers a request to measure and not to train.

    Raises:
        FrameError: Nothing was asked for, or a number cannot be.
    """
    if rule is None or not (alone or rule.fraction):
        raise FrameError("the plan asks for no evaluation, and the frame holds one.")
    if found.after is not None and (alone or rule.values == "before"):
        raise FrameError("the evaluation is of the values received alone, and tells of trained.")
    if found.num_rows > most_rows and not grows:
        raise FrameError(
            f"an evaluation is of at most the {most_rows} rows that the client has for it, got "
            f"{found.num_rows}."
        )
    least, most = RANGES.get(metric, (-math.inf, math.inf))
    for value in (found.before, found.after):
        if value is not None and not least <= value <= most:
            raise FrameError(f"{metric} lies between {least:g} and {most:g}, got {value!r}.")
    return replace(found, num_rows=min(found.num_rows, max(most_rows, 1)))


def spreads_of(found: Iterable[ClientMetric], metric: str) -> dict[str, dict[str, Any]]:
    """Return the spreads of the values received, "before", and of the trained ones, "after".

    Where nothing was measured the name is not there.
    """
    measured = list(found)
    spreads = {"before": spread_of(((m.num_rows, m.before) for m in measured), metric)}
    if any(m.after is not None for m in measured):
        spreads["after"] = spread_of(((m.num_rows, m.after) for m in measured), metric)
    return {name: spread for name, spread in spreads.items() if spread}


def spread_of(measured: Iterable[tuple[int, float | None]], metric: str) -> dict[str, Any]:
    """Sum up a metric over clients.

    Args:
        measured: Rows and value of each client; None of a model whose outputs are not finite.
        metric: Its name, which says what is worse.

    Returns:
        How many "clients" and "rows" there are; the "row_mean", weighted by rows, which of a
        perplexity is that of all tokens; the "mean" over clients; "worst_decile", the mean over the
        worst tenth, one client at least; "worst" and "best"; "not_finite", how many clients had no
        value, where any had none. Without any value only that; {} without clients.

    Example:
        >>> found = spread_of([(1, 0.5), (3, 1.0), (4, None)], "accuracy")
        >>> found["row_mean"], found["mean"], found["worst_decile"], found["not_finite"]
        (0.875, 0.75, 0.5, 1)
    """
    every = list(measured)
    finite = [(rows, value) for rows, value in every if value is not None]
    lost = {"not_finite": len(every) - len(finite)} if len(finite) < len(every) else {}
    if not finite:
        return lost
    values = sorted((value for _, value in finite), reverse=not greater_is_better(metric))
    worst = values[: max(1, len(values) // 10)]
    return {
        "clients": len(values),
        "rows": sum(rows for rows, _ in finite),
        "row_mean": _row_mean(finite, metric),
        "mean": math.fsum(values) / len(values),
        "worst_decile": math.fsum(worst) / len(worst),
        "worst": values[0],
        "best": values[-1],
        **lost,
    }


def _row_mean(measured: Sequence[tuple[int, float]], metric: str) -> float:
    """Weigh values by rows; perplexities by the losses that they are the exponentials of."""
    rows = sum(count for count, _ in measured)
    if metric == "perplexity":
        return math.exp(math.fsum(count * math.log(value) for count, value in measured) / rows)
    return math.fsum(count * value for count, value in measured) / rows
