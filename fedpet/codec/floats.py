"""The codecs "float32", to the bit, and "bfloat16", the upper half of it.

    backbone -> mask -> structure -> search -> model -> [codec]
             -> plan -> client -> strategy -> ledger -> report

In:  values, float32 (n,), finite.
Out: byte planes. Exponents repeat and compress to a third; what is left of a float is noise and
     is stored. A trained vector takes about 27 of 32 bits, or 11 of 16; zeros take next to nothing.

The sign is turned to the lowest bit first, so that the exponent has a byte of its own.

"bfloat16" rounds stochastically: 16 random bits are added below the cut, so the expected value is
the value itself. The relative error is below 2^-7, and a value that bfloat16 has stays as it is.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedpet.codec.seeds import Purpose, random_words
from fedpet.codec.wire import Reader, pack_bytes, unpack_bytes

Floats = npt.NDArray[np.float32]

_LARGEST_BFLOAT16 = np.uint32(0x7F7F0000).view(np.float32)


def encode_float32(values: Floats, *, entropy: bool = True) -> bytes:
    """Write float32 (n,) to the bit."""
    bits = values.view(np.uint32)
    turned = (bits << np.uint32(1) | bits >> np.uint32(31)).astype("<u4", copy=False)
    return _pack(turned.view(np.uint8).reshape(-1, 4), entropy)


def decode_float32(reader: Reader, count: int) -> Floats:
    """Read float32 (count,). NaN and infinity are the caller's to refuse."""
    turned = np.empty((count, 4), dtype=np.uint8)
    _unpack(reader, turned)
    bits = turned.view("<u4").ravel().astype(np.uint32, copy=False)
    return (bits >> np.uint32(1) | bits << np.uint32(31)).view(np.float32)


def encode_bfloat16(values: Floats, seed: int, *, entropy: bool = True) -> bytes:
    """Write float32 (n,) as bfloat16, stochastically rounded."""
    clipped = np.clip(values, -_LARGEST_BFLOAT16, _LARGEST_BFLOAT16)
    noise = random_words(seed, Purpose.ROUNDING, len(values), np.uint16)
    upper = (clipped.view(np.uint32) + noise >> np.uint32(16)).astype(np.uint16)
    turned = (upper << np.uint16(1) | upper >> np.uint16(15)).astype("<u2", copy=False)
    return _pack(turned.view(np.uint8).reshape(-1, 2), entropy)


def decode_bfloat16(reader: Reader, count: int) -> Floats:
    """Read float32 (count,), the lower 16 bits zero. Not finite is the caller's to refuse."""
    turned = np.empty((count, 2), dtype=np.uint8)
    _unpack(reader, turned)
    upper = turned.view("<u2").ravel().astype(np.uint32)
    return ((upper >> np.uint32(1) | upper << np.uint32(15)) << np.uint32(16)).view(np.float32)


def _pack(turned: npt.NDArray[np.uint8], entropy: bool) -> bytes:
    planes = reversed(range(turned.shape[1]))  # the exponents first
    return b"".join(
        pack_bytes(np.ascontiguousarray(turned[:, plane]), entropy=entropy) for plane in planes
    )


def _unpack(reader: Reader, turned: npt.NDArray[np.uint8]) -> None:
    for plane in reversed(range(turned.shape[1])):
        turned[:, plane] = unpack_bytes(reader, len(turned))
