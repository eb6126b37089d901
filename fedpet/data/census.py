"""Count clients and their rows without a tokeniser: what an estimate needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from fedpet.config import ClientsConfig, DataConfig
from fedpet.data.dealt_rows import bare_rows, deal_rows
from fedpet.data.encoded_rows import task_of
from fedpet.data.open_source import open_source
from fedpet.data.partition import drop_small_clients
from fedpet.data.split_rows import train_and_held_out
from fedpet.tasks import Task, kind_of

__all__ = ["ClientCounts", "count_clients"]


@dataclass(frozen=True)
class ClientCounts:
    """Clients and classes that would take part in a run, without any text."""

    task: Task
    num_rows: Mapping[str, int]  # client -> rows it trains on, clients in alphabetical order
    num_held_out: Mapping[str, int]  # client -> rows that it holds out


def count_clients(data: DataConfig, population: ClientsConfig, *, cache: Path) -> ClientCounts:
    """Count the clients that `load_data` would find, without a tokeniser.

    Args:
        data: What to read, as in `load_data`.
        population: How rows become clients.
        cache: Root of the cache.

    Raises:
        DataError: Rows, columns, labels or clients that cannot be used.
        ConfigError: Settings that contradict each other or the data.
    """
    cache = Path(cache)
    source = open_source(data.source)
    train, _ = train_and_held_out(source, data)
    source.check(train.name)
    task = task_of(train, data, cache)
    kind = kind_of(task)

    entry = bare_rows(train, data, task, cache, partial(kind.read, train, data, task))
    dealt = deal_rows(train, entry, data, population, cache)
    parts, held_out = dealt.parts, dealt.held_out
    if kind.packs:  # reckoned: there is no tokeniser
        sizes, counts = entry.arrays["sizes"], {}
        for name, rows in parts.items():
            counts[name] = -(-int(sizes[rows].sum()) // data.max_length)
            held = held_out.get(name, rows[:0])
            if (
                len(held) and counts[name] < population.min_rows
            ):  # it holds out none, as a run has it
                both, held_out[name] = np.union1d(rows, held), held[:0]
                counts[name] = -(-int(sizes[both].sum()) // data.max_length)
        parts = {name: np.broadcast_to(0, count) for name, count in counts.items()}
    clients = drop_small_clients(parts, dealt.num_rows, population).clients
    return ClientCounts(
        task,
        {client.id: len(client.rows) for client in clients},
        {client.id: len(held_out.get(client.id, ())) for client in clients},
    )
