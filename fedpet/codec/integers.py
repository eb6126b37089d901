"""Encode by "int8" or "int4": whole multiples of a block's scale, rounded without bias.

In:  values, float32 (n,), finite, in groups that share no block.
Out: a scale a block (bfloat16), and a symbol a value: 255 levels in blocks of 1024, or 15 in
     blocks of 64.

A scale is the block's largest magnitude over 127 (or 7), rounded up, so that no value is clipped
but within a hundredth of float32's largest, where a scale rounded up would overflow. A value
is rounded up or down at random, by how near each is: its expected value is the value itself, and
its error is below one scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedpet.codec.entropy import Reader, pack_symbols, unpack_symbols
from fedpet.codec.floats import pack_words, unpack_words, widen
from fedpet.codec.random_bits import Purpose, random_words
from fedpet.codec.vector_types import Floats, Groups
from fedpet.errors import FrameError


@dataclass(frozen=True)
class Grid:
    """A grid of symbols -limit ... limit, and the values of a block."""

    limit: int
    block: int

    @property
    def alphabet(self) -> int:
        return 2 * self.limit + 1

    @property
    def largest_scale(self) -> np.uint16:
        """The upper half of the largest scale whose every multiple is a float32."""
        largest = np.finfo(np.float32).max / np.float32(self.limit)
        return np.uint16(largest.view(np.uint32) >> np.uint32(16))


GRIDS = {"int8": Grid(127, 1024), "int4": Grid(7, 64)}


def encode_integers(
    values: Floats, grid: Grid, groups: Groups, seed: int, *, entropy: bool = True
) -> bytes:
    """Write float32 (n,) on the grid."""
    starts, lengths = _blocks(grid, groups)
    largest = np.maximum.reduceat(np.abs(values), starts)
    needed = largest / np.float32(grid.limit)
    upper = (needed.view(np.uint32) + np.uint32(0xFFFF) >> np.uint32(16)).astype(np.uint16)
    np.minimum(upper, grid.largest_scale, out=upper)
    scales = widen(upper)
    scales[scales == 0] = 1  # of zeros
    multiples = values / np.repeat(scales, lengths)
    multiples += _uniform(seed, len(values))
    np.floor(multiples, out=multiples)
    np.clip(multiples, -grid.limit, grid.limit, out=multiples)  # the sum above was rounded
    multiples += np.float32(grid.limit)
    symbols = multiples.astype(np.uint8)
    return pack_words(upper, entropy=entropy) + pack_symbols(
        symbols, grid.alphabet, entropy=entropy
    )


def decode_integers(reader: Reader, grid: Grid, groups: Groups) -> Floats:
    """Read float32 (n,).

    Raises:
        FrameError: A scale is not a finite number, or the bytes are no blocks.
    """
    starts, lengths = _blocks(grid, groups)
    scales = widen(unpack_words(reader, len(starts), np.uint16))
    if not (np.isfinite(scales).all() and not np.signbit(scales).any()):
        raise FrameError("the scale of a block must be finite and not negative: one is not.")
    symbols = unpack_symbols(reader, groups[-1][1], grid.alphabet)
    values = symbols.astype(np.float32)
    values -= np.float32(grid.limit)
    values *= np.repeat(scales, lengths)
    return values


def _blocks(grid: Grid, groups: Groups) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    starts = np.concatenate([np.arange(start, stop, grid.block) for start, stop in groups])
    return starts, np.diff(starts, append=groups[-1][1])


def _uniform(seed: int, count: int) -> Floats:
    """Draw uniformly from [0, 1), multiples of 2^-24: exact in float32."""
    words = random_words(seed, Purpose.ROUNDING, count, np.uint32)
    return (words >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)
