"""Rotate a vector at random, so that its entries look normal; the same to the bit everywhere.

In:  the values of groups side by side, float32 (n,).
Out: the same number of values, rotated: an orthogonal map, so that lengths and errors stay.

A window of C = 2^d <= 4096 values is multiplied by random signs and a Hadamard matrix, twice: once
spreads a dense vector, twice spreads even a single spike into something normal. Where a group's
last window overlaps the one before it (fedpet/codec/windows.py), it is rotated after it.

The matrix is applied by additions and subtractions in a fixed order, elementwise, without BLAS: in
numpy they reach three quarters of the speed of a matrix product, and no result depends on a kernel,
a number of threads or a fused multiply-add. The scale of two transforms is 1/C, a power of two,
exact. So two machines that decode one payload hold the same bits, and so do numpy, the compiled
kernels (fedpet/codec/compiled.py) and torch (fedpet/codec/torch_rotation.py), which add in the same
order.

Source: Vargaftik et al., DRIVE (NeurIPS 2021) and EDEN (ICML 2022), for the rotation. Ours: two
rounds, and overlapping windows for a length that is no power of two.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from fedpet.codec.acceleration import compiled_kernels
from fedpet.codec.random_bits import Purpose, bit_generator
from fedpet.codec.vector_types import Floats
from fedpet.codec.windows import window_size

Packed = npt.NDArray[np.uint8]  # a bit a sign

_SLAB = 1 << 18  # values at a time, 1 MiB: a slab and its copy stay in the cache
_ROUNDS = 2


class Rotation:
    """Rotation of groups, drawn from a seed.

    Args:
        sizes: Values of each group, at least 2.
        seed: Any non-negative integer.

    Attributes:
        signs: Packed signs of each group: uint8 (windows, 2, C/8), a bit a sign.
    """

    def __init__(self, sizes: tuple[int, ...], seed: int) -> None:
        generator = bit_generator(seed, Purpose.ROTATION)
        self._sizes = sizes
        self.signs = [_draw_signs(size, generator) for size in sizes]

    def forward(self, values: Floats) -> Floats:
        """Rotate values (n,) in place, and return them."""
        for group, size, signs in self._groups(values):
            whole = len(group) // size * size
            if fast := compiled_kernels(len(group)):
                fast.rotate(group, signs, size)
                continue
            _forward(group[:whole].reshape(-1, size), signs[: whole // size])
            if whole < len(group):
                _forward(group[-size:].reshape(1, size), signs[whole // size :])
        return values

    def backward(self, values: Floats) -> Floats:
        """Undo `forward` in place, and return the values."""
        for group, size, signs in self._groups(values):
            whole = len(group) // size * size
            if fast := compiled_kernels(len(group)):
                fast.unrotate(group, signs, size)
                continue
            if whole < len(group):
                _backward(group[-size:].reshape(1, size), signs[whole // size :])
            _backward(group[:whole].reshape(-1, size), signs[: whole // size])
        return values

    def _groups(self, values: Floats) -> Iterator[tuple[Floats, int, Packed]]:
        offset = 0
        for count, signs in zip(self._sizes, self.signs, strict=True):
            yield values[offset : offset + count], window_size(count), signs
            offset += count


@lru_cache(maxsize=8)
def shared_rotation(sizes: tuple[int, ...], seed: int) -> Rotation:
    """Return a rotation that many vectors share; the last few are kept."""
    return Rotation(sizes, seed)


def _draw_signs(count: int, bits: np.random.BitGenerator) -> Packed:
    """Draw the packed signs of both rounds: uint8 (windows, 2, C/8)."""
    size = window_size(count)
    windows = count // size + (count % size > 0)
    num_bytes = _ROUNDS * windows * max(size // 8, 1)
    words = np.asarray(bits.random_raw(-(-num_bytes // 8))).astype("<u8", copy=False)
    return words.view(np.uint8)[:num_bytes].reshape(windows, _ROUNDS, -1)


def _forward(windows: Floats, signs: Packed) -> None:
    rows = rows_of(windows.shape[1])
    for slab, first, second in _slabs(windows, signs):
        _flip(slab, first)
        once, spare = _hadamard(slab, np.empty_like(slab), rows)
        _flip(once, second)
        twice, _ = _hadamard(once, spare, rows)
        np.multiply(twice, np.float32(1 / slab.shape[1]), out=slab)


def _backward(windows: Floats, signs: Packed) -> None:
    rows = windows.shape[1] // rows_of(windows.shape[1])
    for slab, first, second in _slabs(windows, signs):
        once, spare = _hadamard(slab, np.empty_like(slab), rows)
        _flip(once, second)
        twice, _ = _hadamard(once, spare, rows)
        np.multiply(twice, np.float32(1 / slab.shape[1]), out=slab)
        _flip(slab, first)


def _slabs(windows: Floats, signs: Packed) -> Iterator[tuple[Floats, Packed, Packed]]:
    step = max(_SLAB // windows.shape[1], 1)
    for first in range(0, len(windows), step):
        slab = slice(first, first + step)
        yield windows[slab], signs[slab, 0], signs[slab, 1]


def rows_of(size: int) -> int:
    """Return the rows of a window of C values as a matrix, about the root of C."""
    return 1 << (size.bit_length() - 1) // 2


def _flip(slab: Floats, signs: Packed) -> None:
    """Change the sign of a slab (m, C) where the packed signs (m, C/8) have a one."""
    flips = np.unpackbits(signs, axis=1, count=slab.shape[1], bitorder="little").astype(np.uint32)
    flips <<= np.uint32(31)
    bits = slab.view(np.uint32)
    np.bitwise_xor(bits, flips, out=bits)


def _hadamard(slab: Floats, spare: Floats, rows: int) -> tuple[Floats, Floats]:
    """Transform each window of a slab (m, C), not scaled, with `spare` of the same shape.

    A window is read as a matrix (rows, C/rows) and left transposed: its Kronecker factors are
    applied along the rows before and after, where numpy's inner loops are long. With C/rows for
    `rows` the transposed window comes back in order.

    Returns:
        The result, in one of the two arrays, and the other one.
    """
    windows, size = slab.shape
    slab, spare = _butterflies(slab, spare, rows)
    turned = spare.reshape(windows, size // rows, rows)
    np.copyto(turned, slab.reshape(windows, rows, size // rows).transpose(0, 2, 1))
    return _butterflies(spare, slab, size // rows)


def _butterflies(slab: Floats, spare: Floats, rows: int) -> tuple[Floats, Floats]:
    windows, size = slab.shape
    step = size // rows
    while step < size:
        pairs = slab.reshape(windows, -1, 2, step)
        out = spare.reshape(windows, -1, 2, step)
        np.add(pairs[:, :, 0], pairs[:, :, 1], out=out[:, :, 0])
        np.subtract(pairs[:, :, 0], pairs[:, :, 1], out=out[:, :, 1])
        slab, spare = spare, slab
        step *= 2
    return slab, spare
