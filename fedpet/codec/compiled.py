"""Compile the codec's kernels by numba: the same additions in the same order as in numpy.

Neither fast math nor fused multiply-adds: every result has the bits of the numpy version
(fedpet/codec/rotation.py, fedpet/codec/dither.py), and the tests compare them. Importing this
module compiles the kernels or loads what is kept; fedpet/codec/acceleration.py does it when it
pays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np

from fedpet.codec.windows import MAX_WINDOW

__all__ = ["dequantise", "fold", "quantise", "rotate", "unrotate"]

Array = np.ndarray[Any, Any]
Kernel = TypeVar("Kernel", bound=Callable[..., Any])

_SIGN = np.uint32(1 << 31)
_ROTATION = "(float32[::1], uint8[:, :, ::1], int64)"
_CODED = "int16[::1], uint16[::1], int64[::1], int64[::1], float32[::1]"


def _kernel(signature: str = "") -> Callable[[Kernel], Kernel]:
    def compiled(function: Kernel) -> Kernel:
        njit: Any = numba.njit
        options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
        arguments = [signature] if signature else []
        try:
            kernel: Kernel = njit(*arguments, **options, cache=True)(function)
        except RuntimeError:  # there is nowhere to keep it
            kernel = njit(*arguments, **options)(function)
        return kernel

    return compiled


@_kernel()
def _flip(window: Array, signs: Array) -> None:
    """Change the sign of values (C,) where the packed signs (C/8,) have a one."""
    bits = window.view(np.uint32)
    for index in range(len(signs)):
        byte = np.uint32(signs[index])
        eight = bits[8 * index : 8 * index + 8]
        for place in range(8):
            eight[place] ^= (byte << np.uint32(31 - place)) & _SIGN


@_kernel()
def _butterflies(window: Array, step: int) -> None:
    """Add and subtract at distances `step`, twice it, ... up to half the window, two at a time."""
    size = len(window)
    while 4 * step <= size:
        for start in range(0, size, 4 * step):
            a = window[start : start + step]
            b = window[start + step : start + 2 * step]
            c = window[start + 2 * step : start + 3 * step]
            d = window[start + 3 * step : start + 4 * step]
            for i in range(step):
                ab, ba, cd, dc = a[i] + b[i], a[i] - b[i], c[i] + d[i], c[i] - d[i]
                a[i], b[i], c[i], d[i] = ab + cd, ba + dc, ab - cd, ba - dc
        step *= 4
    if 2 * step <= size:
        a, b = window[:step], window[step:]
        for i in range(step):
            a[i], b[i] = a[i] + b[i], a[i] - b[i]


@_kernel()
def _hadamard(window: Array, turned: Array, rows: int) -> None:
    """Transform a window into `turned`, which is left transposed; the window is used up."""
    _butterflies(window, len(window) // rows)
    before, after = window.reshape(rows, -1), turned.reshape(-1, rows)
    for column in range(after.shape[0]):
        for row in range(after.shape[1]):
            after[column, row] = before[row, column]
    _butterflies(turned, rows)


@_kernel()
def _rows(size: int) -> int:
    rows = 1
    while 4 * rows * rows <= size:
        rows *= 2
    return rows


@_kernel()
def _scale(window: Array) -> None:
    factor = np.float32(1) / np.float32(len(window))
    for i in range(len(window)):
        window[i] *= factor


@_kernel()
def _forward(window: Array, spare: Array, signs: Array) -> None:
    rows = _rows(len(window))
    _flip(window, signs[0])
    _hadamard(window, spare, rows)
    _flip(spare, signs[1])
    _hadamard(spare, window, rows)
    _scale(window)


@_kernel()
def _backward(window: Array, spare: Array, signs: Array) -> None:
    rows = len(window) // _rows(len(window))
    _hadamard(window, spare, rows)
    _flip(spare, signs[1])
    _hadamard(spare, window, rows)
    _scale(window)
    _flip(window, signs[0])


@_kernel(_ROTATION)
def rotate(group: Array, signs: Array, size: int) -> None:
    """Rotate a group's values (n,) in place, as `rotation.Rotation.forward`."""
    spare = np.empty(size, np.float32)
    whole = len(group) // size
    for index in range(whole):
        _forward(group[index * size : (index + 1) * size], spare, signs[index])
    if len(group) % size:
        _forward(group[len(group) - size :], spare, signs[whole])


@_kernel(_ROTATION)
def unrotate(group: Array, signs: Array, size: int) -> None:
    """Undo `rotate` in place."""
    spare = np.empty(size, np.float32)
    whole = len(group) // size
    if len(group) % size:
        _backward(group[len(group) - size :], spare, signs[whole])
    for index in range(whole):
        _backward(group[index * size : (index + 1) * size], spare, signs[index])


@_kernel("(float32[::1], int64[::1], int64[::1], float32[::1])")
def deviations(rotated: Array, starts: Array, lengths: Array, found: Array) -> None:
    """Write the root mean square of each unit, as `dither.deviations`."""
    squares = np.empty(MAX_WINDOW, np.float64)
    for unit in range(len(starts)):
        count = lengths[unit]
        window = rotated[starts[unit] : starts[unit] + count]
        half = 1
        while 2 * half < count:
            half *= 2
        for i in range(count):
            squares[i] = np.float64(window[i]) * np.float64(window[i])
        for i in range(half, count):
            squares[i - half] += squares[i]
        while half > 1:
            half //= 2
            upper = squares[half : 2 * half]
            for i in range(half):
                squares[i] += upper[i]
        found[unit] = np.float32(np.sqrt(squares[0] / count))


@_kernel("(float32[::1], uint16[::1], int64[::1], int64[::1], float32[::1], int16[::1])")
def quantise(
    rotated: Array, words: Array, starts: Array, lengths: Array, steps: Array, symbols: Array
) -> None:
    """Write the symbols of rotated values (n,), as `dither.quantise`."""
    for unit in range(len(starts)):
        first, stop = starts[unit], starts[unit] + lengths[unit]
        window, dither, coded = rotated[first:stop], words[first:stop], symbols[first:stop]
        inverse = np.float32(0)
        if steps[unit] > 0:
            inverse = np.float32(1) / steps[unit]
        for i in range(len(window)):
            word = np.uint32(dither[i])
            offset = (np.float32(word & np.uint32(0x7FFF)) + np.float32(0.5)) * np.float32(2**-16)
            sign = np.float32(1) - np.float32(word >> np.uint32(15)) * np.float32(2)
            coded[i] = np.int16(np.rint(window[i] * inverse * sign + offset))


@_kernel(f"({_CODED}, float32[::1])")
def dequantise(
    symbols: Array, words: Array, starts: Array, lengths: Array, steps: Array, values: Array
) -> None:
    """Write the rotated values (n,) of symbols, as `dither.dequantise`."""
    for unit in range(len(starts)):
        first, stop = starts[unit], starts[unit] + lengths[unit]
        coded, dither, out = symbols[first:stop], words[first:stop], values[first:stop]
        step = steps[unit]
        for i in range(len(coded)):
            word = np.uint32(dither[i])
            offset = (np.float32(word & np.uint32(0x7FFF)) + np.float32(0.5)) * np.float32(2**-16)
            sign = np.float32(1) - np.float32(word >> np.uint32(15)) * np.float32(2)
            out[i] = (np.float32(coded[i]) - offset) * (step * sign)


@_kernel(f"({_CODED}, float64, float64[::1])")
def fold(
    symbols: Array,
    words: Array,
    starts: Array,
    lengths: Array,
    steps: Array,
    weight: float,
    total: Array,
) -> None:
    """Add the rotated values (n,) of symbols, times a weight, to a sum."""
    for unit in range(len(starts)):
        first, stop = starts[unit], starts[unit] + lengths[unit]
        coded, dither, out = symbols[first:stop], words[first:stop], total[first:stop]
        step = steps[unit]
        for i in range(len(coded)):
            word = np.uint32(dither[i])
            offset = (np.float32(word & np.uint32(0x7FFF)) + np.float32(0.5)) * np.float32(2**-16)
            sign = np.float32(1) - np.float32(word >> np.uint32(15)) * np.float32(2)
            out[i] += weight * np.float64((np.float32(coded[i]) - offset) * (step * sign))
