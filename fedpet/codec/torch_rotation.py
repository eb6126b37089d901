"""Rotate many senders' vectors at once by torch, where they lie: on a GPU, before they come back.

In:  values of m senders on one device, float32 (m, n), one rotation for all of them.
Out: the same numbers that numpy rotates them to, to the bit.

Additions and subtractions are those of fedpet/codec/rotation.py, in its order, each elementwise;
signs multiply by 1 and -1, the scale is a power of two. IEEE 754 leaves no choice in any of it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fedpet.codec.rotation import rows_of, shared_rotation
from fedpet.codec.vector_codec import VectorCodec
from fedpet.codec.windows import LARGEST, Windows, window_size, windows_of

__all__ = ["rotate_updates"]


@torch.no_grad()
def rotate_updates(values: Tensor, coding: VectorCodec, rotation_seed: int) -> bool:
    """Rotate each row in place, as `coding.encode(row, rotated=True)` takes it.

    Args:
        values: float32 (m, n).
        coding: The senders' codec.
        rotation_seed: The one that all of them share.

    Returns:
        Whether it was done. It is not where the codec has no such rotation, nor where a value is no
        number or so large that `encode` has to name it as it is.
    """
    parts = [part for part in coding.parts if part.is_rotated_alike]
    # A rotated value is at most 64 times the largest of its window.
    if not parts or not bool((values.abs() < LARGEST / 128).all()):
        return False
    for part in parts:
        where: slice | Tensor
        if isinstance(part.where, slice):
            where = part.where
        else:
            where = torch.from_numpy(part.where).to(values.device)
        own, windows = values[:, where], windows_of(part.groups)
        _rotate_groups(own, windows, part.seeds(0, rotation_seed)["rotation_seed"])
        values[:, where] = own
    return True


def _rotate_groups(values: Tensor, windows: Windows, seed: int) -> None:
    signs = _signs(windows.sizes, seed, values.device)
    for (start, stop), (whole, last) in zip(windows.turned, signs, strict=True):
        size = whole.shape[-1]
        middle = start + whole.shape[1] * size
        _rotate(values[:, start:middle], whole)
        if middle < stop:
            _rotate(values[:, stop - size : stop], last)


@lru_cache(maxsize=4)
def _signs(sizes: tuple[int, ...], seed: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Return each group's signs as factors, (2, windows, C): of whole windows, and the last."""
    places = torch.arange(8, dtype=torch.uint8, device=device)
    factors = []
    for packed, count in zip(shared_rotation(sizes, seed).signs, sizes, strict=True):
        moved = torch.from_numpy(np.moveaxis(packed, 1, 0).copy()).to(device)
        bits = ((moved.unsqueeze(-1) >> places) & 1).flatten(-2)  # (2, windows, C)
        signs = 1 - 2 * bits.float()
        whole = count // window_size(count)
        factors.append((signs[:, :whole], signs[:, whole:]))
    return factors


def _rotate(values: Tensor, signs: Tensor) -> None:
    windows = values.reshape(len(values), *signs.shape[1:])  # (m, windows, C)
    size = windows.shape[-1]
    for factors in signs:
        windows = _hadamard(windows * factors, rows_of(size))
    values.copy_((windows * (1 / size)).flatten(1))


def _hadamard(windows: Tensor, rows: int) -> Tensor:
    shape, size = windows.shape, windows.shape[-1]
    windows = _butterflies(windows, rows)
    turned = windows.unflatten(-1, (rows, size // rows)).transpose(-1, -2).reshape(shape)
    return _butterflies(turned, size // rows)


def _butterflies(windows: Tensor, rows: int) -> Tensor:
    shape, size = windows.shape, windows.shape[-1]
    step = size // rows
    while step < size:
        first, second = windows.view(*shape[:-1], -1, 2, step).unbind(-2)
        windows = torch.stack((first + second, first - second), -2).view(shape)
        step *= 2
    return windows
