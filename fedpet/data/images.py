"""Read an image of a row: an array, a file's bytes, its path, or Pillow's own object.

In:  what stands in the column.
Out: uint8 (height, width, 3).

An array has 0 to 255 and the shape (height, width), (height, width, 1) or (height, width, 3). A
dictionary with "bytes" or "path" is an image of `datasets`. A path is taken from the folder of the
source's files.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from fedpet.errors import DataError

__all__ = ["path_of", "read_image"]


def path_of(value: Any, folder: Path | None) -> Path | None:
    """Return the file that a row names, if it names one."""
    if isinstance(value, dict) and value.get("bytes") is None:
        value = value.get("path")
    if not isinstance(value, str):
        return None
    return (folder or Path()) / Path(value).expanduser()


def read_image(value: Any, folder: Path | None, where: str) -> np.ndarray:
    """Read an image.

    Args:
        value: Of the column.
        folder: Where paths begin.
        where: The row, for messages.

    Raises:
        DataError: It is none, or cannot be read.
    """
    try:
        return _read(value, folder)
    except Exception as error:  # Pillow and numpy raise many kinds
        reason = " ".join(str(error).split())[:120]
        raise DataError(
            f"{where} has no image that can be read ({type(error).__name__}: {reason}). It must be "
            "an array of 0 to 255 of shape (height, width) or (height, width, 3), or a PNG's or "
            "JPEG's bytes or path: mend or remove the row."
        ) from None


def _read(value: Any, folder: Path | None) -> np.ndarray:
    if isinstance(value, dict) and value.get("bytes") is not None:
        value = value["bytes"]
    path = path_of(value, folder)
    if path is not None or isinstance(value, bytes):
        import PIL.Image

        with PIL.Image.open(path or io.BytesIO(value)) as opened:
            return np.asarray(opened.convert("RGB"))
    if hasattr(value, "convert"):
        return np.asarray(value.convert("RGB"))
    array = np.asarray(value)
    if array.dtype.kind not in "iu" or array.min() < 0 or array.max() > 255:
        raise ValueError(f"an array of {array.dtype}, not of 0 to 255")
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3) or not array.size:
        raise ValueError(f"shape {array.shape}")
    return np.broadcast_to(array, (*array.shape[:2], 3)).astype(np.uint8)
