"""Read speech of a row: samples, a WAV file's bytes, or its path.

In:  what stands in the column.
Out: float32 (samples,), in -1 to 1.

Samples alone are taken at the model's rate. A dictionary has "array" and "sampling_rate", or
"bytes" or "path", as `datasets` writes it. A WAV file holds 8, 16 or 32 bits a sample; its channels
are averaged. A path is taken from the folder of the source's files. Nothing is resampled: another
rate is refused.
"""

from __future__ import annotations

import io
import wave
from pathlib import Path
from typing import Any

import numpy as np

from fedpet.data.images import path_of
from fedpet.errors import DataError

__all__ = ["read_audio"]

_SAMPLES = {1: "u1", 2: "<i2", 4: "<i4"}  # by bytes


def read_audio(value: Any, rate: int, folder: Path | None, where: str) -> np.ndarray:
    """Read speech.

    Args:
        value: Of the column.
        rate: Samples a second that the model takes.
        folder: Where paths begin.
        where: The row, for messages.

    Raises:
        DataError: It is none, cannot be read, or has another rate.
    """
    try:
        samples, found = _read(value, folder)
        if samples.ndim != 1 or not len(samples) or not np.isfinite(samples).all():
            raise ValueError(f"samples of shape {samples.shape}")
    except Exception as error:  # wave and numpy raise many kinds
        reason = " ".join(str(error).split())[:120]
        raise DataError(
            f"{where} has no speech that can be read ({type(error).__name__}: {reason}). It must "
            "be a list of numbers from -1 to 1, or a WAV file's bytes or path: mend or remove the "
            "row."
        ) from None
    if found not in (None, rate):
        raise DataError(
            f"{where} has {found} samples a second, and the model takes {rate}: resample the "
            "recording."
        )
    return samples


def _read(value: Any, folder: Path | None) -> tuple[np.ndarray, int | None]:
    if isinstance(value, dict) and value.get("array") is not None:
        return np.asarray(value["array"], dtype=np.float32), int(value["sampling_rate"])
    if isinstance(value, dict) and value.get("bytes") is not None:
        value = value["bytes"]
    path = path_of(value, folder)
    if path is None and not isinstance(value, bytes):
        return np.asarray(value, dtype=np.float32), None
    with wave.open(str(path) if path is not None else io.BytesIO(value)) as opened:
        size, channels = opened.getsampwidth(), opened.getnchannels()
        read = np.frombuffer(opened.readframes(opened.getnframes()), _SAMPLES[size])
        samples = read.astype(np.float64) - (128 if size == 1 else 0)  # 8 bits have no sign
        mean = samples.reshape(-1, channels).mean(1) / 2.0 ** (8 * size - 1)
        return mean.astype(np.float32), opened.getframerate()
