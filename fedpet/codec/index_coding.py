"""Encode the positions of a sparse vector, or of an explicit mask, near their entropy.

In:  sorted flat positions, a tensor at a time, and the tensors' sizes.
Out: bytes: for each tensor its count, one Rice parameter, and its gaps.

The gaps of a random set are geometric, for which a Rice code with the right parameter is within one
percent of the limit n·H(p). Tensors differ in density, so each has its own parameter. A gap is
split: its upper part is counted in unary, its lower `shift` bits are stored as they are, in two
streams apart, so that numpy reads and writes both without a loop over entries. A tensor of which
more than half is chosen is coded by the entries that are not.

Source: Golomb 1966; Rice 1979. Ours: the two streams, the cost computed exactly for each parameter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedpet.codec.entropy import Reader, pack_planes, unpack_planes, varint
from fedpet.errors import FrameError

Positions = npt.NDArray[np.int64]

_LEFT_OUT = 0x80  # of the parameter's byte: the gaps are of the entries that are not chosen


def encode_positions(positions: Sequence[npt.NDArray[np.integer]], sizes: Sequence[int]) -> bytes:
    """Write the chosen entries of each tensor.

    Args:
        positions: A tensor's flat positions, integers (k_t,), strictly ascending.
        sizes: Number of entries of each tensor. The reader knows them.

    Raises:
        ValueError: Positions are out of order or out of range.
    """
    return b"".join(
        _encode(np.asarray(chosen, dtype=np.int64), size)
        for chosen, size in zip(positions, sizes, strict=True)
    )


def decode_positions(payload: bytes | memoryview, sizes: Sequence[int]) -> list[Positions]:
    """Read the chosen entries of each tensor.

    Args:
        payload: Bytes of `encode_positions`.
        sizes: Number of entries of each tensor. At most about 20 bytes an entry are allocated.

    Returns:
        For each tensor int64 (k_t,), strictly ascending, below its size.

    Raises:
        FrameError: The bytes are anything else.
    """
    reader = Reader(payload)
    positions = [_decode(reader, size) for size in sizes]
    reader.end()
    return positions


def most_position_bytes(size: int) -> int:
    """Return the most bytes of a tensor's positions: a bitmap and its header."""
    return len(varint(size)) + 1 + (size + 7) // 8


def _encode(chosen: Positions, size: int) -> bytes:
    count = len(chosen)
    if count and (chosen[0] < 0 or chosen[-1] >= size or (chosen[1:] <= chosen[:-1]).any()):
        raise ValueError(
            f"positions must ascend strictly within [0, {size}), got {count} of them from "
            f"{chosen.min()} to {chosen.max()}: sort them, and drop the ones named twice."
        )
    if count in (0, size):
        return varint(count)
    flag = 0
    if 2 * count > size:
        chosen, flag = _others(chosen, size), _LEFT_OUT
    gaps = np.diff(chosen, prepend=-1) - 1  # (k,), 0 for neighbours
    shift = _best_shift(gaps)
    upper = gaps >> shift
    unary = np.zeros(len(gaps) + int(upper.sum()), dtype=np.uint8)
    unary[np.cumsum(upper + 1) - 1] = 1  # a one ends each gap
    return (
        varint(count)
        + bytes([flag | shift])
        + np.packbits(unary, bitorder="little").tobytes()
        + pack_planes(gaps.astype(np.uint64), shift)
    )


def _decode(reader: Reader, size: int) -> Positions:
    count = reader.varint()
    if count > size:
        raise FrameError(f"a tensor of {size} entries cannot have {count} chosen ones.")
    if count in (0, size):
        return np.arange(count, dtype=np.int64)
    parameter = reader.take(1)[0]
    shift, left_out = parameter & ~_LEFT_OUT, bool(parameter & _LEFT_OUT)
    if left_out != (2 * count > size) or shift > max(size - 1, 1).bit_length():
        raise FrameError(
            f"the parameter of a tensor of {size} entries, {count} chosen, cannot be {parameter}."
        )
    num_gaps = size - count if left_out else count
    upper = reader.unary(num_gaps, most_zeros=size >> shift)
    gaps = (upper << shift) + unpack_planes(reader, num_gaps, shift, np.uint64).astype(np.int64)
    # Each gap is at most 2 · size, so the sum of 2^31 of them still fits.
    coded: Positions = np.cumsum(gaps + 1) - 1
    if coded[-1] >= size:
        raise FrameError(f"positions must be below {size}, got {coded[-1]}.")
    return _others(coded, size) if left_out else coded


def _others(chosen: Positions, size: int) -> Positions:
    rest = np.ones(size, dtype=bool)
    rest[chosen] = False
    return np.flatnonzero(rest)


def _best_shift(gaps: Positions) -> int:
    guess = int(float(gaps.mean()) + 1).bit_length() - 1
    shifts: set[int] = {0, *range(max(guess - 2, 0), guess + 2)}  # 0, a bitmap, bounds the size
    return min(shifts, key=lambda shift: (_num_bytes(gaps, shift), shift))


def _num_bytes(gaps: Positions, shift: int) -> int:
    unary_bits: int = len(gaps) + int((gaps >> shift).sum())
    return (unary_bits + 7) // 8 + (len(gaps) + 7) // 8 * shift
