"""Draw random bits that all machines and versions of numpy agree on.

A rotation is drawn twice, by the encoder and by the decoder. numpy promises the raw stream of a bit
generator and the mixing of a `SeedSequence` to stay what they are (NEP 19), and promises nothing
of the kind for distributions: so only raw 64-bit words are taken.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Word = TypeVar("Word", bound=np.unsignedinteger[Any])


class Purpose(IntEnum):
    """Purposes of the bits: independent streams of one seed."""

    ROUNDING = 0
    ROTATION = 1
    DITHER = 2


def bit_generator(seed: int, purpose: Purpose) -> np.random.BitGenerator:
    """Return a stream of raw words. `seed` is any non-negative integer."""
    return np.random.PCG64DXSM(np.random.SeedSequence(seed, spawn_key=(purpose,)))


def random_words(seed: int, purpose: Purpose, count: int, dtype: type[Word]) -> npt.NDArray[Word]:
    """Return `count` random unsigned integers of all their bits, shape (count,)."""
    per_word = 8 // np.dtype(dtype).itemsize
    words = bit_generator(seed, purpose).random_raw(-(-count // per_word))
    little = np.asarray(words).astype("<u8", copy=False).view(np.dtype(dtype).newbyteorder("<"))
    return little[:count].astype(dtype, copy=False)
