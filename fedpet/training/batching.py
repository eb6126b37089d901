"""Cut rows into batches of like length, and put them where a model is.

Shuffled rows are sorted by length within blocks of `BLOCK_BATCHES` batches, and the batches
shuffled again: so attention, and models that fedpet/training/token_packing.py cannot pack, see less
padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedpet.backbone.device import to_device
from fedpet.utils.seeds import derive_seed

if TYPE_CHECKING:
    from fedpet.config import TrainingConfig
    from fedpet.data import Rows

__all__ = ["batches", "client_batches", "inputs_of"]

BLOCK_BATCHES = 4


def batches(
    indices: np.ndarray, lengths: np.ndarray, batch_size: int, generator: np.random.Generator
) -> Iterator[np.ndarray]:
    """Cut one epoch into batches of like length, in a seeded order.

    Args:
        indices: Rows to visit once each, (n,).
        lengths: Tokens of every row, indexed by the entries of `indices`.
        batch_size: Rows a batch; some have fewer.
        generator: Gives the order.
    """
    order = generator.permutation(indices)
    block = BLOCK_BATCHES * batch_size
    cut: list[np.ndarray] = []
    for start in range(0, len(order), block):
        part = order[start : start + block]
        part = part[np.argsort(lengths[part], kind="stable")]
        cut.extend(part[i : i + batch_size] for i in range(0, len(part), batch_size))
    for index in generator.permutation(len(cut)):
        yield cut[index]


def client_batches(
    indices: np.ndarray, lengths: np.ndarray, config: TrainingConfig, seed: int
) -> Iterator[np.ndarray]:
    """Cut all epochs of a client into batches, in the order that `seed` gives."""
    generator = np.random.default_rng(derive_seed("batches", seed))
    for _ in range(config.local_epochs):
        yield from batches(indices, lengths, config.batch_size, generator)


def inputs_of(
    rows: Rows, chosen: np.ndarray, device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    """Return a batch as a model on this device takes it, and its labels."""
    batch = to_device(rows.batch(chosen), device)
    labels = batch.pop("labels")
    return batch, labels
