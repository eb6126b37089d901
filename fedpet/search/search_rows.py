"""Split the rows of a search in three, once, by its seed, and give each step its two batches.

In:  indices of rows, and whose each is where clients stay whole.
Out: rows that move the candidates' values, as many that move alpha, and some that pick the
     checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fedpet.config import SearchConfig
from fedpet.data.rows import Rows
from fedpet.errors import ConfigError, DataError
from fedpet.training.batching import batches
from fedpet.utils.seeds import derive_seed

__all__ = ["Split", "split_rows", "step_batches"]


@dataclass(frozen=True)
class Split:
    """The rows of each part: int64 indices, no row in two of them."""

    theta: np.ndarray  # move the candidates' values
    alpha: np.ndarray  # move alpha; as many
    validation: np.ndarray  # pick the checkpoint


def split_rows(
    indices: np.ndarray, config: SearchConfig, owners: np.ndarray | None = None
) -> Split:
    """Split rows at random, by the seed, into validation and two halves of equal size.

    Args:
        indices: Rows, (n,).
        config: Its seed, the fraction of validation, and whether clients stay whole.
        owners: Of each row, its client's number: int64, (n,). Where clients stay whole, no client
            has rows in two parts; what the larger half has more is left out.

    Raises:
        DataError: Fewer than three rows, or clients.
        ConfigError: Clients shall stay whole, and there are none.
    """
    if config.split == "clients":
        return _split_clients(indices, config, owners)
    if len(indices) < 3:
        raise DataError(
            f"a search splits its rows in three, and got {len(indices)}. Give it more rows."
        )
    order = np.random.default_rng(derive_seed("split", config.seed)).permutation(indices)
    held = min(max(1, round(config.validation_fraction * len(order))), len(order) - 2)
    half = (len(order) - held) // 2
    return Split(
        theta=order[held : held + half],
        alpha=order[held + half : held + 2 * half],
        validation=order[:held],
    )


def _split_clients(indices: np.ndarray, config: SearchConfig, owners: np.ndarray | None) -> Split:
    if owners is None:
        raise ConfigError(
            'search.split = "clients" keeps clients whole, and these rows have none. Set it to '
            '"rows".'
        )
    generator = np.random.default_rng(derive_seed("split", config.seed))
    clients = generator.permutation(np.unique(owners))
    if len(clients) < 3:
        raise DataError(
            f"a search splits its clients in three, and got {len(clients)}. Give it more clients, "
            'or set search.split = "rows".'
        )
    wanted = config.validation_fraction * len(indices)
    parts: tuple[list[np.ndarray], ...] = ([], [], [])  # validation, theta, alpha
    rows = [0, 0, 0]
    for number, client in enumerate(clients):
        into = number if number < 3 else 0
        if number >= 3 and rows[0] >= wanted:
            into = 1 if rows[1] <= rows[2] else 2
        own = indices[owners == client]
        parts[into].append(own)
        rows[into] += len(own)
    validation, theta, alpha = (generator.permutation(np.concatenate(part)) for part in parts)
    half = min(len(theta), len(alpha))
    return Split(theta=theta[:half], alpha=alpha[:half], validation=validation)


def step_batches(
    rows: Rows, split: Split, config: SearchConfig, done: int, total: int
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Yield pairs of batches, theta's and alpha's, of the steps from `done` to before `total`.

    Each epoch over the two halves has its own order.
    """
    per_epoch = -(-len(split.theta) // config.batch_size)
    step = done // per_epoch * per_epoch
    while step < total:
        parts = []
        for name, part in (("theta", split.theta), ("alpha", split.alpha)):
            seed = derive_seed("order", config.seed, step // per_epoch, name)
            generator = np.random.default_rng(seed)
            parts.append(list(batches(part, rows.lengths, config.batch_size, generator)))
        for theta, alpha in zip(*parts, strict=True):
            if done <= step < total:
                yield rows.batch(theta), rows.batch(alpha)
            step += 1
