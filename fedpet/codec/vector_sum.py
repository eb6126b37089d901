"""Add coded vectors of many senders, weighted, without rotating each of them back.

In:  payloads of one `VectorCodec`, in a fixed order, each with its sender's seed and weight.
Out: their sum and mean, float64 (n,).

Values of a "dither" codec are added in the rotated domain, where the senders share one rotation; it
is undone once, in float32, of the mean. Values of any other codec are decoded and added. Sums are
in float64 and depend on the order of the payloads (law 6)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fedpet.codec.dither import Dithered, read_dither, rotation_of
from fedpet.codec.entropy import Reader
from fedpet.codec.pipeline import decode_values
from fedpet.codec.spec import parse_codec
from fedpet.codec.vector_types import Floats
from fedpet.codec.windows import LARGEST, MAX_WINDOW, windows_of
from fedpet.errors import FrameError

if TYPE_CHECKING:
    from fedpet.codec.vector_codec import Part, VectorCodec

__all__ = ["VectorSum"]

Doubles = npt.NDArray[np.float64]
Where = npt.NDArray[np.int64] | slice


class VectorSum:
    """Sum vectors of one codec.

    Args:
        coding: Their codec.
        rotation_seed: Of the rotation that the senders share.
        largest: Bound of the values' magnitude. Of rotated values the windows' deviations are
            bounded, so that no value is beyond it once they are rotated back.

    Attributes:
        weight: Of the vectors so far, together.
    """

    def __init__(
        self, coding: VectorCodec, rotation_seed: int, *, largest: float = LARGEST
    ) -> None:
        self.weight = 0.0
        self._coding, self._rotation_seed, self._largest = coding, rotation_seed, largest
        self._sum = np.zeros(coding.count)
        self._rotated = {
            part.name: np.zeros(sum(windows_of(part.groups).sizes))
            for part in coding.parts
            if windows_of(part.groups).sizes and part.is_rotated_alike
        }

    def add(self, payload: bytes | memoryview, *, seed: int, weight: float) -> None:
        """Add a vector; nothing is added where the payload is wrong.

        Args:
            payload: Of `VectorCodec.encode`, by the same seeds.
            seed: The sender's own.
            weight: Positive.

        Raises:
            FrameError: The payload is anything else, or its values are beyond `largest`.
        """
        payloads = self._coding.split(payload)
        parts = list(zip(self._coding.parts, payloads, strict=True))
        for add in [self._read(part, own, seed) for part, own in parts]:
            add(weight)
        self.weight += weight

    def total(self) -> Doubles:
        """Return the weighted sum, float64 (n,)."""
        total = self._sum.copy()
        for part in self._coding.parts:
            if part.name in self._rotated and self.weight:
                windows = windows_of(part.groups)
                mean = (self._rotated[part.name] / self.weight).astype(np.float32)
                seed = part.seeds(0, self._rotation_seed)["rotation_seed"]
                mean = rotation_of(windows, seed).backward(mean)
                loose = np.zeros(windows.num_loose, dtype=np.float32)
                total[part.where] += self.weight * windows.unite(loose, mean).astype(np.float64)
        return total

    def mean(self) -> Doubles:
        """Return the weighted mean, float64 (n,); zeros of nothing."""
        return self.total() / (self.weight or 1.0)

    def _read(self, part: Part, payload: bytes | memoryview, seed: int) -> Callable[[float], None]:
        """Read and check a part's payload; return the function that adds it."""
        seeds = part.seeds(seed, self._rotation_seed)
        if part.name not in self._rotated:
            values = decode_values(payload, part.codec, part.groups, **seeds)
            _check(np.abs(values).max(initial=0), self._largest)
            return lambda weight: self._add(part.where, values, weight)
        reader = Reader(payload)
        read = read_dither(reader, parse_codec(part.codec).bits, part.groups)
        reader.end()
        # A value is at most 64 deviations of its window, and 64 times that once it is rotated back.
        _check(MAX_WINDOW * float(read.deviations.max(initial=0)), self._largest)
        _check(np.abs(read.loose).max(initial=0), self._largest)
        return lambda weight: self._add_rotated(part, read, seeds["seed"], weight)

    def _add(self, where: Where, values: Floats, weight: float) -> None:
        self._sum[where] += weight * values.astype(np.float64)

    def _add_rotated(self, part: Part, read: Dithered, seed: int, weight: float) -> None:
        read.add_to(self._rotated[part.name], seed, weight)
        if len(read.loose):
            nothing = np.zeros(len(self._rotated[part.name]), dtype=np.float32)
            self._add(part.where, read.windows.unite(read.loose, nothing), weight)


def _check(magnitude: float, largest: float) -> None:
    if not magnitude <= largest:
        raise FrameError(
            f"an update's values are at most {largest:g} in magnitude, and no NaN: the largest "
            f"here may be {magnitude:g}."
        )
