"""Encode by "float32", to the bit, or "bfloat16", its upper half, rounded at random.

In:  values, float32 (n,), finite.
Out: byte planes, compressed where that pays. A trained vector takes about 26.5 of 32 bits, or 10.5
     of 16, which is within 0.5 % of what its exponents allow; zeros take next to nothing.

Only exponents repeat, the rest of a float is noise. So a word is turned until one plane holds five
bits of exponent, counted down from the largest, and three of mantissa; a Huffman code fits that
well, as it would not fit an exponent alone. The upper exponent bits, nearly always 0, share the
last plane with the sign and four bits of mantissa.

"bfloat16" rounds stochastically: 16 random bits are added below the cut, so the expected value is
the value itself. The relative error is below 2^-7, and a value that bfloat16 has stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from fedpet.codec.entropy import Reader, pack_bytes, unpack_bytes
from fedpet.codec.random_bits import Purpose, Word, random_words
from fedpet.codec.vector_types import Floats

_SLAB = 1 << 16  # words
_LARGEST_BFLOAT16 = np.uint32(0x7F7F0000).view(np.float32)


def encode_float32(values: Floats, *, entropy: bool = True) -> bytes:
    """Write float32 (n,) to the bit."""
    return pack_words(values.view(np.uint32), entropy=entropy)


def decode_float32(reader: Reader, count: int) -> Floats:
    """Read float32 (count,). The caller refuses NaN and infinity."""
    return unpack_words(reader, count, np.uint32).view(np.float32)


def encode_bfloat16(values: Floats, seed: int, *, entropy: bool = True) -> bytes:
    """Write float32 (n,) as bfloat16, stochastically rounded."""
    clipped = np.clip(values, -_LARGEST_BFLOAT16, _LARGEST_BFLOAT16)
    noise = random_words(seed, Purpose.ROUNDING, len(values), np.uint16)
    upper = (clipped.view(np.uint32) + noise >> np.uint32(16)).astype(np.uint16)
    return pack_words(upper, entropy=entropy)


def decode_bfloat16(reader: Reader, count: int) -> Floats:
    """Read float32 (count,), the lower 16 bits zero. The caller refuses infinity and NaN."""
    return widen(unpack_words(reader, count, np.uint16))


def widen(upper: npt.NDArray[np.uint16]) -> Floats:
    """Return the values of bfloat16 words."""
    return (upper.astype(np.uint32) << np.uint32(16)).view(np.float32)


def pack_words(words: npt.NDArray[Word], *, entropy: bool = True) -> bytes:
    """Write float32 or bfloat16 words (n,) in byte planes; nothing for none."""
    if not len(words):
        return b""
    num_planes = words.itemsize
    tops = [int((words[slab] << words.dtype.type(1)).max()) for slab in _slabs(len(words))]
    largest = max(tops) >> 8 * (num_planes - 1)
    ceiling = _ceiling(largest, words.dtype)
    planes = np.empty((num_planes, len(words)), dtype=np.uint8)
    for slab in _slabs(len(words)):
        turned = _turn(words[slab], 1)  # exponent, mantissa, sign
        np.subtract(ceiling, turned, out=turned)
        spread = _turn(turned, 3).astype(words.dtype.newbyteorder("<"), copy=False)
        in_bytes = spread.view(np.uint8).reshape(-1, num_planes)
        for plane in range(num_planes):
            planes[plane, slab] = in_bytes[:, plane]
    return bytes([largest]) + b"".join(pack_bytes(plane, entropy=entropy) for plane in planes)


def unpack_words(reader: Reader, count: int, dtype: type[Word]) -> npt.NDArray[Word]:
    """Read `count` float32 or bfloat16 words."""
    words = np.empty(count, dtype=dtype)
    if not count:
        return words
    num_planes = words.itemsize
    ceiling = _ceiling(reader.take(1)[0], words.dtype)
    planes = [unpack_bytes(reader, count) for _ in range(num_planes)]
    for slab in _slabs(count):
        in_bytes = np.empty((len(planes[0][slab]), num_planes), dtype=np.uint8)
        for plane in range(num_planes):
            in_bytes[:, plane] = planes[plane][slab]
        spread = in_bytes.view(words.dtype.newbyteorder("<")).ravel().astype(dtype, copy=False)
        turned = _turn(spread, -3)
        np.subtract(ceiling, turned, out=turned)
        words[slab] = _turn(turned, -1)
    return words


def _slabs(count: int) -> Iterator[slice]:
    """Yield parts of a vector small enough for the cache."""
    for start in range(0, count, _SLAB):
        yield slice(start, start + _SLAB)


def _turn(words: npt.NDArray[Word], left: int) -> npt.NDArray[Word]:
    """Rotate the bits of each word to the left."""
    width, word = words.itemsize * 8, words.dtype.type
    turned: npt.NDArray[Word] = np.left_shift(words, word(left % width))
    np.bitwise_or(turned, np.right_shift(words, word(-left % width)), out=turned)
    return turned


def _ceiling(largest: int, dtype: np.dtype[Word]) -> Word:
    """Return the largest turned word with an exponent up to `largest`."""
    return dtype.type((largest + 1 << dtype.itemsize * 8 - 8) - 1)
