"""The codecs "float32", to the bit, and "bfloat16", the upper half of it.

    backbone -> mask -> structure -> search -> model -> [codec]
             -> plan -> client -> strategy -> ledger -> report

In:  values, float32 (n,), finite.
Out: byte planes, compressed where that pays. A trained vector takes about 26.6 of 32 bits, or 10.6
     of 16, which is within 0.5 % of what its exponents allow; zeros take next to nothing.

Only exponents repeat, the rest of a float is noise. So a word is turned until one plane holds five
bits of exponent, counted down from the largest, and three of mantissa; a Huffman code fits that
well, as it would not fit an exponent alone. The upper exponent bits, nearly always 0, share the
last plane with the sign and four bits of mantissa.

"bfloat16" rounds stochastically: 16 random bits are added below the cut, so the expected value is
the value itself. The relative error is below 2^-7, and a value that bfloat16 has stays as it is.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedpet.codec.seeds import Purpose, Word, random_words
from fedpet.codec.wire import Reader, pack_bytes, unpack_bytes

Floats = npt.NDArray[np.float32]

_LARGEST_BFLOAT16 = np.uint32(0x7F7F0000).view(np.float32)


def encode_float32(values: Floats, *, entropy: bool = True) -> bytes:
    """Write float32 (n,) to the bit."""
    return pack_words(values.view(np.uint32), entropy=entropy)


def decode_float32(reader: Reader, count: int) -> Floats:
    """Read float32 (count,). NaN and infinity are the caller's to refuse."""
    return unpack_words(reader, count, np.uint32).view(np.float32)


def encode_bfloat16(values: Floats, seed: int, *, entropy: bool = True) -> bytes:
    """Write float32 (n,) as bfloat16, stochastically rounded."""
    clipped = np.clip(values, -_LARGEST_BFLOAT16, _LARGEST_BFLOAT16)
    noise = random_words(seed, Purpose.ROUNDING, len(values), np.uint16)
    upper = (clipped.view(np.uint32) + noise >> np.uint32(16)).astype(np.uint16)
    return pack_words(upper, entropy=entropy)


def decode_bfloat16(reader: Reader, count: int) -> Floats:
    """Read float32 (count,), the lower 16 bits zero. Not finite is the caller's to refuse."""
    return widen(unpack_words(reader, count, np.uint16))


def widen(upper: npt.NDArray[np.uint16]) -> Floats:
    """The values of bfloat16 words."""
    return (upper.astype(np.uint32) << np.uint32(16)).view(np.float32)


def pack_words(words: npt.NDArray[Word], *, entropy: bool = True) -> bytes:
    """Write float32 or bfloat16 words (n,) in byte planes; nothing for none."""
    if not len(words):
        return b""
    turned = _turn(words, 1)  # exponent, mantissa, sign
    largest = int(turned.max() >> _constant(words.dtype, words.itemsize * 8 - 8))
    spread = _turn(_ceiling(largest, words.dtype) - turned, 3)
    planes = spread.astype(words.dtype.newbyteorder("<"), copy=False).view(np.uint8)
    planes = planes.reshape(-1, words.itemsize)
    return bytes([largest]) + b"".join(
        pack_bytes(np.ascontiguousarray(planes[:, plane]), entropy=entropy)
        for plane in range(words.itemsize)
    )


def unpack_words(reader: Reader, count: int, dtype: type[Word]) -> npt.NDArray[Word]:
    """Read `count` float32 or bfloat16 words."""
    if not count:
        return np.empty(0, dtype=dtype)
    little = np.dtype(dtype).newbyteorder("<")
    largest = reader.take(1)[0]
    planes = np.empty((count, little.itemsize), dtype=np.uint8)
    for plane in range(little.itemsize):
        planes[:, plane] = unpack_bytes(reader, count)
    spread = planes.view(little).ravel().astype(dtype, copy=False)
    turned = _ceiling(largest, spread.dtype) - _turn(spread, -3)
    return _turn(turned, -1)


def _turn(words: npt.NDArray[Word], left: int) -> npt.NDArray[Word]:
    """Rotate the bits of each word to the left."""
    width = words.itemsize * 8
    up, down = _constant(words.dtype, left % width), _constant(words.dtype, -left % width)
    return np.bitwise_or(words << up, words >> down)


def _ceiling(largest: int, dtype: np.dtype[Word]) -> Word:
    """A word that no turned word with an exponent up to `largest` exceeds."""
    return _constant(dtype, (largest + 1 << dtype.itemsize * 8 - 8) - 1)


def _constant(dtype: np.dtype[Word], value: int) -> Word:
    return dtype.type(value)
