"""Name the types of vectors and their groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import numpy.typing as npt

__all__ = ["Floats", "Groups", "Seeds"]

Floats = npt.NDArray[np.float32]
Groups = Sequence[tuple[int, int]]  # (start, stop) of parts that are scaled and rotated apart


class Seeds(TypedDict):
    """Seeds of a payload, as `encode_values` takes them: the sender's own, and the rotation's."""

    seed: int
    rotation_seed: int
