"""Choose a learning rate over a grid of three that moves until its best lies inside.

    0.01  0.03  0.1        the best is 0.1, at the edge: the grid moves
          0.03  0.1  0.3   the best is 0.1, inside: it is chosen

Every method's grid has the same size and the same steps, 1, 3, 10, 30 ..., and ends around its
best. A grid that has been moved so often that `most` rates are tried stays, and is flagged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from fedpet.errors import ConfigError

__all__ = ["SIZE", "Choice", "choose_rate", "next_rate"]

SIZE = 3

# The metric of a rate, None where nothing was learned; raises KeyError where it has not been run.
Score = Callable[[float], float | None]


@dataclass(frozen=True)
class Choice:
    """Hold how far the choice of a rate is.

    Attributes:
        tried: Rates in rising order, those that are missing among them.
        missing: To be run before anything more can be said.
        best: The chosen rate; None where some are missing, or none learned anything.
        at_edge: The best is the first or the last that was tried: the grid could move no further.
    """

    tried: tuple[float, ...]
    missing: tuple[float, ...] = ()
    best: float | None = None
    at_edge: bool = False


def next_rate(rate: float, steps: int = 1) -> float:
    """Return the rate so many steps up, or down, the ladder 1, 3, 10, 30.

    Raises:
        ConfigError: The rate is no rung.

    Example:
        >>> next_rate(0.03), next_rate(0.03, -1), next_rate(3.0)
        (0.1, 0.01, 10.0)
    """
    decade = math.floor(math.log10(rate) + 1e-9)
    rung = next((i for i, digit in enumerate("13") if rate == float(f"{digit}e{decade}")), None)
    if rung is None:
        raise ConfigError(f"a rate must be 1 or 3 times a power of ten, got {rate!r}.")
    above, digit = divmod(2 * decade + rung + steps, 2)
    return float(f"{'13'[digit]}e{above}")


def choose_rate(start: float, score: Score, *, most: int, greater: bool = True) -> Choice:
    """Move the grid around `start` until its best lies inside.

    Args:
        start: In the middle at first.
        score: Gives the metric of a rate.
        most: Rates to try at most, at least 3.
        greater: Whether a greater metric is better. Of equals the smaller rate is taken.
    """
    tried = [next_rate(start, step) for step in (-1, 0, 1)]
    while True:
        scores: dict[float, float | None] = {}
        for rate in tried:
            try:
                scores[rate] = score(rate)
            except KeyError:
                continue
        missing = tuple(rate for rate in tried if rate not in scores)
        if missing:
            return Choice(tuple(tried), missing)
        learned = {rate: value for rate, value in scores.items() if value is not None}
        sign = 1 if greater else -1
        best = max(learned, key=lambda rate: (sign * learned[rate], -rate), default=None)
        low = best is None or best == tried[0]
        at_edge = low or best == tried[-1]
        if not at_edge or len(tried) >= most:
            return Choice(tuple(tried), (), best, at_edge)
        if low:
            tried.insert(0, next_rate(tried[0], -1))
        else:
            tried.append(next_rate(tried[-1]))
