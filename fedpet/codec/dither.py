"""Encode by "dither-1" to "dither-8": rotate, add dither, round to whole steps.

In:  values, float32 (n,), finite, below 1e30 in magnitude, in groups that are rotated apart.
Out: a float32 scale for each window of 4096 values, and a whole number of steps a value.

Every window is rotated (fedpet/codec/rotation.py) and scaled by its root mean square s, so that its
values z look like draws of a normal variable of deviation s. With a step D = s·STEPS[b] and a
dither d, uniform on (-1/2, 1/2), that sender and receiver draw from the sender's own seed,

    symbol q = rint(z/D + d)        estimate D·(q - d)

the error z - D·(q - d) is uniform on (-D/2, D/2) and independent of z, whatever z is (Schuchman
1964; Gray and Stockham 1993). So for every vector and every rotation

* the estimate is unbiased (but for 2^-17 of a step, since a dither has 16 bits, and for float32's
  rounding), which EDEN's is over the rotations alone;
* the squared error is STEPS[b]²/12 of the squared norm in expectation;
* senders' errors are independent: the mean of n of them errs by a part 1/n of that, even where they
  send the same vector by the same rotation. Without dither they would err alike, and a mean would
  not help.

Hence all senders of a round may share one public rotation, and a receiver that wants their mean
adds in the rotated domain and rotates back once (fedpet/codec/vector_sum.py). Whole numbers of
steps on one rotation are also what secure aggregation adds up.

A dither is a magnitude and a sign. Symbols are coded times that sign, which the receiver knows: of
a coarse grid it says towards which side rounding goes, and saves 0.15 bits a value at "dither-1",
0.06 at "dither-2".

Source: Roberts 1962 for subtractive dither, Schuchman, IEEE Trans. Comm. Tech. 1964; Gray and
Stockham, IEEE Trans. Inf. Theory 1993. The window's scale as in EDEN (arXiv:2108.08842). Ours: one
rotation a round with a dither a client, the dither's sign in the symbol.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedpet.codec.acceleration import compiled_kernels
from fedpet.codec.entropy import Reader, pack_planes, pack_symbols, unpack_planes, unpack_symbols
from fedpet.codec.floats import decode_float32, encode_float32
from fedpet.codec.random_bits import Purpose, random_words
from fedpet.codec.rotation import Rotation, shared_rotation
from fedpet.codec.vector_types import Floats, Groups
from fedpet.codec.windows import MAX_WINDOW, Windows, windows_of
from fedpet.errors import FrameError

Symbols = npt.NDArray[np.int16]
Words = npt.NDArray[np.uint16]
Doubles = npt.NDArray[np.float64]

# Of a window's deviation; the error is STEPS²/12, a little below that of EDEN at as many bits.
STEPS = {1: 2.6, 2: 1.26, 3: 0.65, 4: 0.336, 5: 0.172, 6: 0.0865, 7: 0.0435, 8: 0.022}
# Symbols of an alphabet, the last of which stands for any other number; two or four fit a byte.
_ALPHABETS = {1: 4, 2: 16, 3: 16} | dict.fromkeys(range(4, 9), 256)
_LEAST_DEVIATION = np.float32(2.0**-100)  # a window below it is sent as zeros: steps stay normal
_PLANES, _CODED = 0, 1


@dataclass(frozen=True)
class Grid:
    """Steps of a dither codec.

    Attributes:
        step: Of a unit deviation.
        alphabet: Number of symbols in the entropy stage.
        most: Largest magnitude of a symbol: a value is at most 64 deviations of its window.
    """

    step: np.float32
    alphabet: int
    most: int

    @property
    def plane_bits(self) -> int:
        """Bits of a symbol that is not entropy-coded."""
        return (2 * self.most).bit_length()


DITHER_GRIDS = {
    bits: Grid(np.float32(step), _ALPHABETS[bits], int(MAX_WINDOW**0.5 / step) + 2)
    for bits, step in STEPS.items()
}


@dataclass(frozen=True)
class Dithered:
    """A payload, read and checked, and not yet rotated back.

    Attributes:
        loose: Values of groups that are not rotated, float32.
        deviations: Of the units, float32.
        symbols: Of the rotated values, int16.
    """

    windows: Windows
    grid: Grid
    loose: Floats
    deviations: Floats
    symbols: Symbols

    def rotated(self, seed: int) -> Floats:
        """Return the estimates before they are rotated back, float32."""
        return dequantise(self.symbols, _words(seed, len(self.symbols)), self.windows, self._steps)

    def add_to(self, total: Doubles, seed: int, weight: float) -> None:
        """Add the estimates, before they are rotated back, times a weight to a sum."""
        if fast := compiled_kernels(len(self.symbols)):
            words, units = _words(seed, len(self.symbols)), self.windows
            places = units.starts, units.lengths
            fast.fold(self.symbols, words, *places, self._steps, float(weight), total)
        else:
            total += weight * self.rotated(seed).astype(np.float64)

    @property
    def _steps(self) -> Floats:
        return self.deviations * self.grid.step


def encode_dither(
    values: Floats,
    bits: int,
    groups: Groups,
    seed: int,
    rotation_seed: int,
    *,
    entropy: bool,
    rotated: bool = False,
) -> bytes:
    """Write float32 (n,) in about `bits` bits a value.

    Args:
        seed: Of the dither; each sender and round has its own.
        rotation_seed: Of the rotation; all senders of a round may share it.
        rotated: The groups are rotated already.

    Raises:
        TrainingError: A value is beyond 1e30.
    """
    windows, grid = windows_of(groups), DITHER_GRIDS[bits]
    loose, turned = windows.divide(values)
    if not rotated:
        rotation_of(windows, rotation_seed).forward(turned)
    found = deviations(turned, windows)
    found[found < _LEAST_DEVIATION] = 0
    symbols = quantise(turned, _words(seed, len(turned)), windows, found * grid.step)
    return (
        encode_float32(loose, entropy=entropy)
        + encode_float32(found, entropy=entropy)
        + _pack(symbols, grid, entropy)
    )


def read_dither(reader: Reader, bits: int, groups: Groups) -> Dithered:
    """Read a payload.

    Raises:
        FrameError: A scale is not a finite number, or the bytes are no windows.
    """
    windows, grid = windows_of(groups), DITHER_GRIDS[bits]
    loose = decode_float32(reader, windows.num_loose)
    found = decode_float32(reader, len(windows.starts))
    if not (np.isfinite(found).all() and not np.signbit(found).any()):
        raise FrameError("the scale of a window must be finite and not negative: one is not.")
    return Dithered(windows, grid, loose, found, _unpack(reader, sum(windows.sizes), grid))


def decode_dither(
    reader: Reader, bits: int, groups: Groups, seed: int, rotation_seed: int
) -> Floats:
    """Read float32 (n,). The caller refuses values that overflow.

    Raises:
        FrameError: See `read_dither`.
    """
    read = read_dither(reader, bits, groups)
    values = rotation_of(read.windows, rotation_seed).backward(read.rotated(seed))
    return read.windows.unite(read.loose, values)


def rotation_of(windows: Windows, rotation_seed: int) -> Rotation:
    """Return the rotation of a vector's groups."""
    return shared_rotation(windows.sizes, rotation_seed)


def deviations(rotated: Floats, windows: Windows) -> Floats:
    """Return the root mean square of each unit, float32.

    The squares of a unit, in float64 and zeros behind them up to 4096, are added by halves: one
    order of additions, which every machine keeps.
    """
    starts, lengths = windows.starts, windows.lengths
    found = np.empty(len(starts), dtype=np.float32)
    if fast := compiled_kernels(len(rotated)):
        fast.deviations(rotated, starts, lengths, found)
        return found
    at_once = 64  # units, 2 MiB of squares
    for first in range(0, len(starts), at_once):
        part = slice(first, first + at_once)
        squares = np.zeros((len(starts[part]), MAX_WINDOW))
        inside = np.arange(MAX_WINDOW) < lengths[part, np.newaxis]
        stop = starts[part][-1] + lengths[part][-1]
        squares[inside] = np.square(rotated[starts[first] : stop], dtype=np.float64)
        while squares.shape[1] > 1:
            half = squares.shape[1] // 2
            squares = squares[:, :half] + squares[:, half:]
        found[part] = np.sqrt(squares[:, 0] / lengths[part])
    return found


def quantise(rotated: Floats, words: Words, windows: Windows, steps: Floats) -> Symbols:
    """Return the symbols of rotated values, 0 where a unit's step is 0."""
    if fast := compiled_kernels(len(rotated)):
        symbols = np.empty(len(rotated), dtype=np.int16)
        fast.quantise(rotated, words, windows.starts, windows.lengths, steps, symbols)
        return symbols
    inverse: Floats = np.divide(np.float32(1), steps, out=np.zeros_like(steps), where=steps > 0)
    multiples = rotated * np.repeat(inverse, windows.lengths)
    multiples *= _signs(words)
    multiples += _offsets(words)
    np.rint(multiples, out=multiples)
    return multiples.astype(np.int16)


def dequantise(symbols: Symbols, words: Words, windows: Windows, steps: Floats) -> Floats:
    """Return the rotated values of symbols."""
    if fast := compiled_kernels(len(symbols)):
        values = np.empty(len(symbols), dtype=np.float32)
        fast.dequantise(symbols, words, windows.starts, windows.lengths, steps, values)
        return values
    values = symbols.astype(np.float32)
    values -= _offsets(words)
    values *= np.repeat(steps, windows.lengths) * _signs(words)
    return values


def _words(seed: int, count: int) -> Words:
    return random_words(seed, Purpose.DITHER, count, np.uint16)


def _offsets(words: Words) -> Floats:
    """Return the magnitudes of dithers: the lower 15 bits, within (0, 1/2)."""
    offsets = (words & np.uint16(0x7FFF)).astype(np.float32)
    offsets += np.float32(0.5)
    offsets *= np.float32(2**-16)
    return offsets


def _signs(words: Words) -> Floats:
    """Return the signs of dithers: the upper bit."""
    return np.float32(1) - (words >> np.uint16(15)).astype(np.float32) * np.float32(2)


def _pack(symbols: Symbols, grid: Grid, entropy: bool) -> bytes:
    """Write symbols entropy-coded where that is shorter, else at a fixed number of bits."""
    stored = (len(symbols) + 7) // 8 * grid.plane_bits
    if entropy:
        limit = (grid.alphabet - 2) // 2
        digits = (symbols + np.int16(limit)).view(np.uint16)
        beyond = np.flatnonzero(digits > 2 * limit)
        digits[beyond] = grid.alphabet - 1
        others = symbols[beyond].astype("<i2").tobytes()
        coded = pack_symbols(digits.astype(np.uint8), grid.alphabet) + others
        if len(coded) < stored:
            return bytes([_CODED]) + coded
    planes = (symbols + np.int16(grid.most)).astype(np.uint16)
    return bytes([_PLANES]) + pack_planes(planes, grid.plane_bits)


def _unpack(reader: Reader, count: int, grid: Grid) -> Symbols:
    """Read `count` symbols.

    Raises:
        FrameError: They are not such symbols.
    """
    mode = reader.take(1)[0]
    if mode == _PLANES:
        planes = unpack_planes(reader, count, grid.plane_bits, np.uint16)
        symbols: Symbols = planes.view(np.int16) - np.int16(grid.most)
    elif mode == _CODED:
        limit = (grid.alphabet - 2) // 2
        digits = unpack_symbols(reader, count, grid.alphabet)
        symbols = digits.astype(np.int16) - np.int16(limit)
        beyond = np.flatnonzero(digits == grid.alphabet - 1)
        symbols[beyond] = np.frombuffer(reader.take(2 * len(beyond)), dtype="<i2")
    else:
        raise FrameError(f"steps are stored (0) or entropy-coded (1), got mode {mode}.")
    if count and max(symbols.max(), -int(symbols.min())) > grid.most:
        raise FrameError(f"a value is at most {grid.most} steps from 0, one is further away.")
    return symbols
