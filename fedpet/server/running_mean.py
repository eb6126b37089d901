"""A weighted mean that holds one vector, however many are folded into it."""

from __future__ import annotations

import numpy as np

from fedpet.pet.tiers import Where


class RunningMean:
    """Sums updates and weights in float64, each entry over those who trained it.

    Fold in a fixed order: floating-point sums depend on it (law 6).
    """

    def __init__(self, num_values: int) -> None:
        self._sum = np.zeros(num_values, dtype=np.float64)
        self._whole = 0  # weight of those who trained every entry
        self._part: np.ndarray | None = None  # and of those who trained a part, by entry

    def fold(self, change: np.ndarray, where: Where, weight: int) -> None:
        """Add one client's update.

        Args:
            change: float32, (n,).
            where: Which n entries it is of, each once.
            weight: Rows it trained on.
        """
        self._sum[where] += weight * change.astype(np.float64)
        if isinstance(where, slice):
            self._whole += weight
        else:
            if self._part is None:
                self._part = np.zeros_like(self._sum)
            self._part[where] += weight

    def moved(self, values: np.ndarray) -> np.ndarray:
        """`values` moved by the mean update of each entry; where nobody trained, as they were.

        Returns:
            float32, (num_values,).
        """
        weights = self._whole if self._part is None else self._whole + self._part
        mean = values.astype(np.float64) + self._sum / np.maximum(weights, 1)
        return mean.astype(np.float32)
