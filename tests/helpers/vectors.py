"""Vectors for the tests that encode, the codecs they are encoded by, and how far off they come."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedpet.codec import decode_values, encode_values
from fedpet.codec.spec import CODEC_IDS

PLAIN_CODECS = (*CODEC_IDS, *(f"{base}-raw" for base in CODEC_IDS))
CODECS = (*PLAIN_CODECS, "topk-0.1+eden-4", "topk-0.25+float32-raw", "topk-0.999999+int8")
LOSSLESS = ("float32", "float32-raw")


def roundtrip(
    values: np.ndarray,
    codec: str,
    groups: Sequence[tuple[int, int]] | None = None,
    seed: int = 0,
) -> np.ndarray:
    """The vector as its receiver decodes it; in one group where none are given."""
    groups = groups or [(0, len(values))]
    return decode_values(encode_values(values, codec, groups, seed=seed), codec, groups, seed=seed)


def draw(name: str, count: int, seed: int = 0) -> np.ndarray:
    """A vector of float32 from the distribution of that name."""
    rng = np.random.default_rng(seed)
    values = {
        "gaussian": rng.standard_normal,
        "laplace": lambda n: rng.laplace(size=n),
        "student-t3": lambda n: rng.standard_t(3, size=n),
        "spike": lambda n: np.eye(1, n, n // 3)[0],
    }[name](count)
    return values.astype(np.float32)


def squared_error(values: np.ndarray, decoded: np.ndarray) -> float:
    """Relative to the squared norm."""
    values = values.astype(np.float64)
    return ((decoded - values) ** 2).sum() / (values**2).sum()
