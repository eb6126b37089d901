"""Rotate a vector at random, so that its entries look normal; the same to the bit everywhere.

In:  a group's values, float32 (n,), n >= 2.
Out: the same number of values, rotated: an orthogonal map, so that lengths and errors stay.

A window of C = 2^d <= 4096 values is multiplied by random signs and a Hadamard matrix, twice: once
spreads a dense vector, twice spreads even a single spike into something normal. Windows stand side
by side; where C does not divide n, one more window covers the last C values, some of them for the
second time. So nothing is padded and not a bit is spent on the remainder.

The matrix is applied by additions and subtractions in a fixed order, elementwise, without BLAS: in
numpy they reach three quarters of the speed of a matrix product, and no result depends on a kernel,
a number of threads or a fused multiply-add. The scale of two transforms is 1/C, a power of two,
exact. So two machines that decode one payload hold the same bits.

Source: Vargaftik et al., DRIVE (NeurIPS 2021) and EDEN (ICML 2022), for the rotation. Ours: two
rounds, and overlapping windows for a length that is no power of two.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from fedpet.codec.vector_types import Floats

Packed = npt.NDArray[np.uint8]  # a bit a sign

MAX_WINDOW = 4096  # 64 x 64
_SLAB = 1 << 18  # values at a time, 1 MiB: a slab and its copy stay in the cache
_ROUNDS = 2


def window_size(count: int) -> int:
    """Return the size C of a group's windows, the largest power of two up to n and 4096."""
    return min(MAX_WINDOW, 1 << count.bit_length() - 1)


def rotate(values: Floats, bits: np.random.BitGenerator) -> Floats:
    """Rotate one group's values (n,) by signs drawn from `bits`. The input stays as it is."""
    size = window_size(len(values))
    whole = len(values) // size * size
    signs, last_signs = _draw_signs(len(values), size, bits)
    rotated = values.copy()
    _forward(rotated[:whole].reshape(-1, size), signs)
    if whole < len(values):
        _forward(rotated[-size:].reshape(1, size), last_signs)
    return rotated


def unrotate(rotated: Floats, bits: np.random.BitGenerator) -> Floats:
    """Undo `rotate`, given a generator in the state that `rotate` got it."""
    size = window_size(len(rotated))
    whole = len(rotated) // size * size
    signs, last_signs = _draw_signs(len(rotated), size, bits)
    values = rotated.copy()
    if whole < len(values):
        _backward(values[-size:].reshape(1, size), last_signs)
    _backward(values[:whole].reshape(-1, size), signs)
    return values


def _draw_signs(count: int, size: int, bits: np.random.BitGenerator) -> tuple[Packed, Packed]:
    """Draw the packed signs of both rounds: uint8 (2, windows, C/8) and (2, 1, C/8)."""
    windows = count // size
    total = windows + (count % size > 0)
    num_bytes = _ROUNDS * total * max(size // 8, 1)
    words = np.asarray(bits.random_raw(-(-num_bytes // 8))).astype("<u8", copy=False)
    packed = words.view(np.uint8)[:num_bytes].reshape(total, _ROUNDS, -1).transpose(1, 0, 2)
    return packed[:, :windows], packed[:, windows:]


def _forward(windows: Floats, signs: Packed) -> None:
    rows = _rows(windows.shape[1])
    for slab, (first, second) in _slabs(windows, signs):
        _flip(slab, first)
        once, spare = _hadamard(slab, np.empty_like(slab), rows)
        _flip(once, second)
        twice, _ = _hadamard(once, spare, rows)
        np.multiply(twice, np.float32(1 / slab.shape[1]), out=slab)


def _backward(windows: Floats, signs: Packed) -> None:
    rows = windows.shape[1] // _rows(windows.shape[1])
    for slab, (first, second) in _slabs(windows, signs):
        once, spare = _hadamard(slab, np.empty_like(slab), rows)
        _flip(once, second)
        twice, _ = _hadamard(once, spare, rows)
        np.multiply(twice, np.float32(1 / slab.shape[1]), out=slab)
        _flip(slab, first)


def _slabs(windows: Floats, signs: Packed) -> Iterator[tuple[Floats, Packed]]:
    step = max(_SLAB // windows.shape[1], 1)
    for first in range(0, len(windows), step):
        yield windows[first : first + step], signs[:, first : first + step]


def _rows(size: int) -> int:
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
