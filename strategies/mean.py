"""A weighted mean that holds one vector, however many are folded into it."""

from __future__ import annotations

import numpy as np


class RunningMean:
    """Sums updates and weights in float64.

    Fold in a fixed order: floating-point sums depend on it (law 6).
    """

    def __init__(self, num_values: int) -> None:
        self._sum = np.zeros(num_values, dtype=np.float64)
        self._weight = 0

    def fold(self, change: np.ndarray, weight: int) -> None:
        """Add one client's update, float32, (num_values,), with its weight."""
        self._sum += weight * change.astype(np.float64)
        self._weight += weight

    def moved(self, values: np.ndarray) -> np.ndarray:
        """`values` moved by the mean update. float32, (num_values,)."""
        mean = values.astype(np.float64) + self._sum / max(self._weight, 1)
        return mean.astype(np.float32)
