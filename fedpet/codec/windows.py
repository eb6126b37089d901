"""Divide a vector's groups into windows that are rotated and scaled apart.

A group of n values has windows of C values, C the largest power of two up to n and 4096. They stand
side by side; where C does not divide n, one more window covers the last C values, some of them for
the second time. So nothing is padded and not a bit is spent on the remainder. A unit has a scale of
its own: it is a window, or what the last, overlapping window leaves of the one before it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from fedpet.codec.vector_types import Floats, Groups
from fedpet.errors import TrainingError

MAX_WINDOW = 4096  # 64 x 64
LEAST_ROTATED = 32  # values; smaller groups are sent as they are
LARGEST = 1e30  # beyond it float32 could not add up a window


def window_size(count: int) -> int:
    """Return the size C of a group's windows, the largest power of two up to n and 4096."""
    return min(MAX_WINDOW, 1 << count.bit_length() - 1)


class Windows:
    """Windows of a vector's groups.

    Attributes:
        loose: Groups of fewer than 32 values, which are sent as they are.
        turned: Groups that are rotated.
    """

    def __init__(self, groups: Groups) -> None:
        filled = [group for group in groups if group[0] < group[1]]
        self.loose = [group for group in filled if group[1] - group[0] < LEAST_ROTATED]
        self.turned = [group for group in filled if group[1] - group[0] >= LEAST_ROTATED]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of the rotated groups."""
        return tuple(stop - start for start, stop in self.turned)

    @cached_property
    def num_loose(self) -> int:
        """Number of values that are sent as they are."""
        return sum(stop - start for start, stop in self.loose)

    @cached_property
    def starts(self) -> npt.NDArray[np.int64]:
        """Starts of the units, in the rotated groups side by side."""
        starts: list[npt.NDArray[np.int64]] = [np.empty(0, dtype=np.int64)]
        offset = 0
        for count in self.sizes:
            size = window_size(count)
            starts.append(offset + np.arange(0, count - size + 1, size))
            if count % size:
                starts.append(np.array([offset + count - size]))
            offset += count
        return np.concatenate(starts)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Lengths of the units."""
        return np.diff(self.starts, append=sum(self.sizes))

    def divide(self, values: npt.NDArray[np.floating]) -> tuple[Floats, Floats]:
        """Return the loose values and the others, each side by side, copied.

        Raises:
            TrainingError: A value is beyond 1e30.
        """
        largest = max(values.max(initial=0), -values.min(initial=0))
        if largest > LARGEST:
            raise TrainingError(
                f"a rotation takes values up to {LARGEST:g} in magnitude, got {largest:g}: "
                "training diverged, lower the learning rate."
            )
        return _join(values, self.loose), _join(values, self.turned)

    def unite(self, loose: npt.NDArray[np.floating], turned: npt.NDArray[np.floating]) -> Floats:
        """Return the values that `divide` took apart, in the dtype of `turned`."""
        values = np.empty(len(loose) + len(turned), dtype=turned.dtype)
        for part, groups in ((loose, self.loose), (turned, self.turned)):
            offset = 0
            for start, stop in groups:
                values[start:stop] = part[offset : offset + stop - start]
                offset += stop - start
        return values


def windows_of(groups: Groups) -> Windows:
    """Return the windows of a vector's groups; those of the last few vectors are kept."""
    return _windows_of(tuple(groups))


@lru_cache(maxsize=32)
def _windows_of(groups: tuple[tuple[int, int], ...]) -> Windows:
    return Windows(groups)


def _join(values: npt.NDArray[np.floating], groups: Iterable[tuple[int, int]]) -> Floats:
    parts = [values[start:stop] for start, stop in groups]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.float32)
