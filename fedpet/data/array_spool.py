"""Append to an array that outgrows memory: its bytes lie in an unnamed file.

In:  arrays of one type, one after the other.
Out: the whole, as a .npy file or as an array.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["ArraySpool", "save_array"]

_BYTES_IN_MEMORY = 1 << 20


class ArraySpool:
    """A one-dimensional array that grows at its end.

    Args:
        dtype: Of the elements.
        folder: Where the unnamed file lies; None takes the system's place for such files.
    """

    def __init__(self, dtype: Any, folder: Path | None = None) -> None:
        self.dtype = np.dtype(dtype)
        place = str(folder or tempfile.gettempdir())
        self._file = tempfile.SpooledTemporaryFile(_BYTES_IN_MEMORY, dir=place)  # noqa: SIM115  see below
        weakref.finalize(self, self._file.close)
        self._count = 0

    def append(self, array: np.ndarray) -> None:
        """Append elements."""
        self._file.write(array.astype(self.dtype, copy=False).data)
        self._count += len(array)

    def array(self) -> np.ndarray:
        """Return the whole in memory."""
        self._file.seek(0)
        return np.frombuffer(self._file.read(), dtype=self.dtype)

    def save(self, path: Path) -> None:
        """Write the whole as `numpy.save` does, without reading it into memory."""
        header = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self._count,),
        }
        self._file.seek(0)
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            shutil.copyfileobj(self._file, file, 1 << 20)


def save_array(path: Path, array: np.ndarray | ArraySpool) -> None:
    """Write an array as a .npy file."""
    if isinstance(array, ArraySpool):
        array.save(path)
    else:
        np.save(path, array, allow_pickle=False)
