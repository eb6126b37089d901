"""Name the types of vectors and their groups."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["Floats", "Groups"]

Floats = npt.NDArray[np.float32]
Groups = Sequence[tuple[int, int]]  # (start, stop) of parts that are scaled and rotated apart
