"""Encode a vector by a codec's name, and decode it again: the whole codec as two functions.

In:  finite values (n,), a codec's name, a seed.
Out: bytes, and the values again up to the error that the codec states.

A federation does the same with `VectorCodec`, which gives the head a codec of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fedpet.codec.pipeline import decode_values, encode_values
from fedpet.codec.vector_types import Floats

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["decode", "encode"]


def encode(
    values: Tensor | npt.ArrayLike,
    codec: str = "dither-4",
    *,
    seed: int = 0,
    groups: Sequence[tuple[int, int]] | None = None,
) -> bytes:
    """Write a vector of floats.

    Args:
        values: Finite, (n,): a tensor, an array or a list.
        codec: "float32", "bfloat16", "int8", "int4", "dither-1" ... "dither-8", ...
        seed: Of rounding and rotation. A new one a vector makes errors average out; `decode` needs
            the same.
        groups: (start, stop) of parts that are scaled apart, from 0 to n; None is one part.

    Raises:
        ConfigError: No such codec.
        ValueError: The values are no vector, or not finite.

    Example:
        >>> import numpy as np
        >>> delta = np.linspace(-1, 1, 1000)
        >>> payload = encode(delta, "dither-4", seed=1)
        >>> len(payload) < 4 * len(delta) / 7
        True
        >>> error = decode(payload, "dither-4", count=1000, seed=1) - delta
        >>> bool(np.square(error).sum() / np.square(delta).sum() < 0.02)
        True
    """
    if hasattr(values, "detach"):  # torch is not imported for arrays
        values = values.detach().cpu().numpy()
    flat = np.asarray(values, dtype=np.float32)
    if flat.ndim != 1:
        raise ValueError(f"values must be a vector, got the shape {flat.shape}. Flatten them.")
    if not np.isfinite(flat).all():
        raise ValueError(
            f"values must be finite, and {int((~np.isfinite(flat)).sum())} of {len(flat)} are not. "
            "Leave such vectors out."
        )
    return encode_values(flat, codec, _groups(groups, len(flat)), seed=seed)


def decode(
    payload: bytes,
    codec: str = "dither-4",
    *,
    count: int,
    seed: int = 0,
    groups: Sequence[tuple[int, int]] | None = None,
) -> Floats:
    """Read a payload of `encode`, with the same codec, seed and groups.

    Args:
        payload: From `encode`.
        count: Number of values, which a payload does not hold.

    Returns:
        float32, (count,), finite.

    Raises:
        ConfigError: No such codec.
        FrameError: The payload is none that `encode` writes.

    Example:
        >>> decode(encode([0.5, -1.0, 2.0], "float32"), "float32", count=3)
        array([ 0.5, -1. ,  2. ], dtype=float32)
    """
    return decode_values(payload, codec, _groups(groups, count), seed=seed)


def _groups(groups: Sequence[tuple[int, int]] | None, count: int) -> list[tuple[int, int]]:
    return [(0, count)] * bool(count) if groups is None else list(groups)
