"""What two rows of a table differ by, seed by seed, and what two structures share.

In:  scores by seed, or sets of modules.
Out: a mean with its standard error, or a fraction.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence, Set
from typing import Any

__all__ = ["jaccard", "over"]


def over(scores: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """How much one method has over another of the same seeds: mean and standard error."""
    more = [a - b for a, b in zip(scores, others, strict=True)]
    error = statistics.stdev(more) / len(more) ** 0.5 if len(more) > 1 else 0.0
    return statistics.mean(more), error


def jaccard(one: Set[Any], other: Set[Any]) -> float:
    """What two sets share of all that either has; 0 where both are empty."""
    return len(one & other) / max(1, len(one | other))
