"""Choose the largest values of a group (top-k sparsification).

In:  a group's values, float32 (n,), and how many may be sent.
Out: the positions of the largest in magnitude, ascending.

The values left out are lost, unless `encode_with_feedback` adds them to the next round's.

Source: Aji and Heafield, EMNLP 2017, arXiv:1704.05021.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedpet.codec.spec import PPM


def num_kept(count: int, topk_ppm: int) -> int:
    """Return how many of `count` values a share in millionths sends, rounded up."""
    return -(-count * topk_ppm // PPM)


def largest(values: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.int64]:
    """Return the `count` largest magnitudes' positions, ascending; ties to the earlier, no zero."""
    magnitude = np.abs(values)
    count = min(count, int(np.count_nonzero(magnitude)))
    if not count:
        return np.empty(0, dtype=np.int64)
    least = np.partition(magnitude, len(values) - count)[len(values) - count]
    above = magnitude > least
    ties = np.flatnonzero(magnitude == least)[: count - int(np.count_nonzero(above))]
    above[ties] = True
    return np.flatnonzero(above)
