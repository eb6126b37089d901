"""Select a set of candidates inside the budget, by their probabilities.

In:  a probability and a size a candidate, a budget.
Out: the chosen candidates' indices, likeliest first; or a random set under the same budget.

The whole list is walked from the likeliest down: what still fits is taken, what does not is
skipped and the walk goes on. So less is left of the budget than the smallest one not chosen.

Candidates may share a tensor: BitFit and HiWi on one bias send one vector. One of them is taken at
most, the likelier: a second would move what is moved already.

Source: S3PET (Hu et al., NeurIPS 2022, arXiv:2206.07382), released code. Ours: shared tensors,
and a random set that ends where the released one can draw for ever.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["chosen_size", "select", "select_at_random"]


def select(
    p: Sequence[float],
    sizes: Sequence[int],
    budget: float,
    tensors: Sequence[str] | None = None,
) -> list[int]:
    """Walk from the likeliest down and take what fits; ties go to the lower index.

    Args:
        p: Probability of each candidate, or whatever rises with it.
        sizes: Values of each candidate.
        budget: In values; law 8: the chosen ones' size never exceeds it.
        tensors: Names of what the candidates send; none is chosen twice.

    Returns:
        Indices in the order of choice.

    Example:
        >>> select([0.9, 0.8, 0.1], sizes=[60, 50, 30], budget=100)
        [0, 2]
    """
    order = sorted(range(len(sizes)), key=lambda index: -p[index])  # stable
    bill = _Budget(sizes, budget, tensors)
    return [index for index in order if bill.take(index)]


def select_at_random(
    sizes: Sequence[int], budget: float, *, seed: int, tensors: Sequence[str] | None = None
) -> list[int]:
    """Take candidates uniformly among those that still fit, until none does.

    Example:
        >>> sorted(select_at_random([60, 50, 30], budget=80, seed=1)) in ([0], [1, 2])
        True
    """
    generator = np.random.default_rng(seed)
    bill = _Budget(sizes, budget, tensors)
    left = list(range(len(sizes)))
    chosen: list[int] = []
    while left := [index for index in left if bill.fits(index)]:
        index = left.pop(int(generator.integers(len(left))))
        bill.take(index)
        chosen.append(index)
    return chosen


def chosen_size(
    chosen: Sequence[int], sizes: Sequence[int], tensors: Sequence[str] | None = None
) -> int:
    """Count the values that a set of candidates sends, a shared tensor once.

    Example:
        >>> chosen_size([0, 1, 2], sizes=[8, 8, 4], tensors=["bias", "bias", "gain"])
        12
    """
    names = [str(index) if tensors is None else tensors[index] for index in chosen]
    return sum(dict(zip(names, (sizes[index] for index in chosen), strict=True)).values())


class _Budget:
    """The rest of a budget, and the tensors not yet taken."""

    def __init__(
        self, sizes: Sequence[int], budget: float, tensors: Sequence[str] | None = None
    ) -> None:
        self._sizes = sizes
        self._tensors = tensors
        self._left = budget
        self._taken: set[str] = set()

    def fits(self, index: int) -> bool:
        free = self._tensors is None or self._tensors[index] not in self._taken
        return free and self._sizes[index] <= self._left

    def take(self, index: int) -> bool:
        """Take a candidate if it fits; say whether."""
        if not self.fits(index):
            return False
        self._left -= self._sizes[index]
        if self._tensors is not None:
            self._taken.add(self._tensors[index])
        return True
