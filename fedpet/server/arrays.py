"""Global values as Flower's round loop holds them: one float32 array."""

from __future__ import annotations

import numpy as np
from flwr.app import Array, ArrayRecord

VALUES = "values"


def to_arrays(values: np.ndarray) -> ArrayRecord:
    """The global values as the ArrayRecord that Flower's loop hands on."""
    return ArrayRecord({VALUES: Array(np.ascontiguousarray(values, dtype=np.float32))})


def from_arrays(arrays: ArrayRecord) -> np.ndarray:
    """The global values of `to_arrays`. float32, (num_values,)."""
    return arrays[VALUES].numpy()
