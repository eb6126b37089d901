"""Deal the rows of a split out to clients: it needs their labels or their client, and no token.

In:  rows by number and label, `DataConfig`, `ClientsConfig`.
Out: the rows of each client, those that it holds out, and counts of the others.

Where clients are limited to some rows each, the rows are dealt out first and those that take part
are tokenised alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedpet.config import ClientsConfig, DataConfig
from fedpet.data.cache import Entry, cached
from fedpet.data.client_rows import held_out_by_clients, natural_clients
from fedpet.data.encoded_rows import ReadRows, rows_key
from fedpet.data.partition import cap_rows, drop_small_clients, partition, partition_with
from fedpet.data.split_rows import Split
from fedpet.tasks import Task, kind_of

__all__ = ["DealtRows", "bare_rows", "deal_rows"]


@dataclass(frozen=True, eq=False)
class DealtRows:
    """The rows of clients, small ones too, by their place among those dealt out."""

    parts: dict[str, np.ndarray]  # client -> int64 (n,), ascending: to train on
    held_out: dict[str, np.ndarray]  # client -> the same: held out by it
    num_rows: int  # dealt out, and of no client
    unowned: int  # of no client
    beyond: int  # of a client, beyond clients.max-rows

    def taking_part(self, population: ClientsConfig, *, min_rows: int) -> np.ndarray:
        """Return the rows of clients with `min_rows` rows or more, int64 (k,), ascending.

        Raises:
            DataError: No client has as many.
        """
        limit = replace(population, min_rows=min_rows)
        clients = drop_small_clients(self.parts, self.num_rows, limit).clients
        held = (self.held_out[one.id] for one in clients if one.id in self.held_out)
        return np.sort(np.concatenate([*(one.rows for one in clients), *held]))

    def among(self, rows: np.ndarray) -> DealtRows:
        """Number the rows by their place among some, (k,); -1 stands for a row that is none."""
        places = np.full(self.num_rows, -1, dtype=np.int64)
        places[rows] = np.arange(len(rows))

        def renumbered(parts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {name: places[own] for name, own in parts.items()}

        return replace(self, parts=renumbered(self.parts), held_out=renumbered(self.held_out))


def bare_rows(split: Split, data: DataConfig, task: Task, cache: Path, read: ReadRows) -> Entry:
    """Return `numbers` and `labels` of a split's rows, and `sizes` reckoned where the task packs.

    Args:
        split: The rows.
        data: The settings.
        task: Its classes.
        cache: Root of the cache.
        read: Reads and checks all rows, where the cache has none.
    """

    def compute() -> Entry:
        raw, kind = read(), kind_of(task)
        numbers = split.choose(data, split.max_rows)
        arrays = {"labels": raw.labels[numbers], "numbers": numbers}
        if kind.packs:
            arrays["sizes"] = kind.sizes(raw)[numbers]
        return Entry(arrays, {})

    return cached(cache, "census", rows_key(split, data, task), compute)


def deal_rows(
    split: Split,
    rows: Entry,
    data: DataConfig,
    population: ClientsConfig,
    cache: Path,
    partitioner: Any = None,
) -> DealtRows:
    """Deal rows out to clients, at most `clients.max-rows` each.

    Args:
        split: The rows.
        rows: Their `numbers` and `labels`.
        data: The settings.
        population: How rows become clients.
        cache: Root of the cache.
        partitioner: As in `load_data`.

    Raises:
        DataError: Columns or clients that cannot be used.
        ConfigError: Settings that contradict the data.
    """
    num_rows = len(rows.arrays["labels"])
    if partitioner is not None:
        dataset = split.read().dataset()
        parts = partition_with(partitioner, dataset.select(rows.arrays["numbers"]))
    elif population.partition == "column":
        parts = natural_clients(split, rows, population.client_column, cache)
    else:
        parts = partition(rows.arrays["labels"], population)
    owned = sum(map(len, parts.values()))
    parts = cap_rows(parts, population)
    beyond = owned - sum(map(len, parts.values()))
    parts, held_out = held_out_by_clients(split, rows, parts, data, population, cache)
    return DealtRows(parts, held_out, num_rows, num_rows - owned, beyond)
