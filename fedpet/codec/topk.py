"""Top-k: which values of a group are worth their position.

    backbone -> mask -> structure -> search -> model -> [codec]
             -> plan -> client -> strategy -> ledger -> report

In:  a group's values, float32 (n,), and how many may be sent.
Out: the positions of the largest in magnitude, ascending.

What is left out is lost unless it is kept for the next round: `encode_with_feedback` does that.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_PPM = 1_000_000


def num_kept(count: int, topk_ppm: int) -> int:
    """How many of `count` values a share in millionths sends: rounded up, so one at least."""
    return -(-count * topk_ppm // _PPM)


def largest(values: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.int64]:
    """Positions of the `count` largest magnitudes, ascending; ties to the earlier, never a zero."""
    magnitude = np.abs(values)
    count = min(count, int(np.count_nonzero(magnitude)))
    if not count:
        return np.empty(0, dtype=np.int64)
    least = np.partition(magnitude, len(values) - count)[len(values) - count]
    above = magnitude > least
    ties = np.flatnonzero(magnitude == least)[: count - int(np.count_nonzero(above))]
    above[ties] = True
    return np.flatnonzero(above)
