"""Hold inputs of rows that are no tokens: images as bytes, speech as spectra.

In:  arrays as they lie in the cache, memory-mapped.
Out: `batch(indices)`: the one float32 tensor that a model takes, under the name it has there.

An image is stored once it is cut to the model's size, a byte a colour: a quarter of the numbers
that the model reads, which are made as a batch is. A spectrum is stored without the frames at its
end that equal its last: the silence up to a model's full length, which is filled in again.

Law: a batch holds what transformers' own processor makes of the same rows; spectra to the bit,
images up to float32's rounding of one scaling.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["DenseInputs", "Frames", "Pixels", "dense_of"]


@dataclass(frozen=True, eq=False)
class Pixels:
    """Images of one size.

    Attributes:
        values: uint8 (n, channels, height, width).
        scale: Each byte is multiplied by it,
        mean: then this is taken off, (channels,),
        deviation: and the rest is divided by this, (channels,).
        num_tokens: That a model makes of each.
    """

    values: np.ndarray
    scale: float
    mean: np.ndarray
    deviation: np.ndarray
    num_tokens: int
    name = "pixel_values"

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        """Return float32 (b, channels, height, width)."""
        scaled = self.values[indices].astype(np.float32) * np.float32(self.scale)
        mean, deviation = (x.astype(np.float32)[:, None, None] for x in (self.mean, self.deviation))
        return {self.name: torch.from_numpy((scaled - mean) / deviation)}

    def take(self, indices: np.ndarray) -> Pixels:
        """Copy some rows."""
        return replace(self, values=self.values[indices])


@dataclass(frozen=True, eq=False)
class Frames:
    """Spectra of one length, without the frames at their ends that equal the last.

    Attributes:
        values: float32 (frames, bins), all rows end to end, at least a frame each.
        offsets: int64 (n + 1,): where each row starts.
        length: Frames of a batch's rows.
        num_tokens: That a model makes of each.
    """

    values: np.ndarray
    offsets: np.ndarray
    length: int
    num_tokens: int
    name = "input_features"

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        """Return float32 (b, bins, length)."""
        starts, stops = self.offsets[indices], self.offsets[indices + 1]
        places = np.minimum(starts[:, None] + np.arange(self.length), stops[:, None] - 1)
        return {self.name: torch.from_numpy(np.moveaxis(self.values[places], 2, 1).copy())}

    def take(self, indices: np.ndarray) -> Frames:
        """Copy some rows."""
        starts, stops = self.offsets[indices], self.offsets[indices + 1]
        parts = [self.values[a:b] for a, b in zip(starts, stops, strict=True)]
        return replace(
            self,
            values=np.concatenate([self.values[:0], *parts]),
            offsets=np.concatenate([[0], np.cumsum(stops - starts)]).astype(np.int64),
        )


DenseInputs = Pixels | Frames


def dense_of(arrays: Mapping[str, Any]) -> DenseInputs | None:
    """Return the inputs that a task's `encode` has stored beside or instead of tokens, if any."""
    if "pixels" in arrays:
        shape, norm = arrays["pixel_shape"], arrays["pixel_norm"]
        channels = int(shape[0])
        return Pixels(
            values=arrays["pixels"].reshape(-1, *shape),
            scale=float(norm[0]),
            mean=norm[1 : 1 + channels],
            deviation=norm[1 + channels :],
            num_tokens=int(arrays["tokens_each"][0]),
        )
    if "frames" in arrays:
        bins, length = arrays["frame_shape"].tolist()
        return Frames(
            values=arrays["frames"].reshape(-1, bins),
            offsets=arrays["frame_offsets"],
            length=length,
            num_tokens=int(arrays["tokens_each"][0]),
        )
    return None
