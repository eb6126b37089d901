"""Rows to clients: by a column of the data, or by a seeded rule over the labels.

In:  the training rows' labels or client column, and a `ClientsConfig`.
Out: the clients, sorted by id, each with the numbers of its rows.

The rules give each row to exactly one client. Of a client with more than `max_rows` rows a seeded
sample is taken. One with fewer than `min_rows` rows, none included, takes no part: it is counted,
with its rows, and never appears.

Source: Dirichlet over labels: Hsu, Qi and Brown, 2019, arXiv:1909.06335, in the common form that
draws each class's shares over the clients. Shards: McMahan et al., AISTATS 2017,
arXiv:1602.05629. Ours: both leave a client that got too few rows out, where others draw again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedpet.config import ClientsConfig
from fedpet.errors import ConfigError, DataError
from fedpet.utils.seeds import derive_seed

_ROW_COLUMN = "fedpet_row"


@dataclass(frozen=True, eq=False)
class Client:
    """One owner of data."""

    id: str
    rows: np.ndarray  # int64 (n,), row numbers in the training rows, ascending
    held_out: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # never trained on

    @property
    def num_rows(self) -> int:
        """Rows that it holds, to train on and to evaluate on."""
        return len(self.rows) + len(self.held_out)


@dataclass(frozen=True)
class Clients:
    """Clients that take part, and counts of what does not."""

    clients: tuple[Client, ...]  # sorted by id
    left_out_clients: int
    left_out_rows: int


def name_of_client(value: Any) -> str | None:
    """Return the id in a value of a client column: a text as it is written, 3 for 3.0.

    None for a missing value, and for a text of blanks.
    """
    if value is None or value != value:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value)
    return text if text.strip() else None


def group_rows(codes: np.ndarray, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Group rows by client: row i belongs to names[codes[i]]."""
    order = np.argsort(codes, kind="stable")
    ends = np.cumsum(np.bincount(codes, minlength=len(names)))
    return dict(zip(names, np.split(order, ends[:-1]), strict=True))


def partition(labels: np.ndarray, population: ClientsConfig) -> dict[str, np.ndarray]:
    """Deal rows out by the rule "dirichlet", "shards" or "iid".

    Args:
        labels: Class indices int64 (n,), or regression values float32 (n,).
        population: The rule, how many clients, and the seed.

    Returns:
        Row numbers by client id, a disjoint cover of 0 ... n-1; some may be empty.

    Raises:
        ConfigError: "dirichlet" over labels that are no classes.
    """
    rng = np.random.Generator(np.random.PCG64(population.seed))
    n, num_clients = len(labels), population.num_clients
    if population.partition == "dirichlet":
        if labels.dtype.kind == "f":
            raise ConfigError(
                "clients.partition 'dirichlet' deals out classes, and a regression has none: "
                "take 'column', 'shards' (which sorts by the value) or 'iid'."
            )
        owner = _dirichlet(labels, num_clients, population.dirichlet_alpha, rng)
    elif population.partition == "shards":
        owner = _shards(labels, num_clients, population.shards_per_client, rng)
    else:
        assert population.partition == "iid"
        owner = np.empty(n, dtype=np.int64)
        owner[rng.permutation(n)] = np.arange(n) % num_clients
    return group_rows(owner, numbered(num_clients))


def _dirichlet(
    labels: np.ndarray, num_clients: int, alpha: float, rng: np.random.Generator
) -> np.ndarray:
    alpha = min(alpha, 1e9)  # equal shares by then; the sum of 1e308s would overflow
    owner = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(num_clients, alpha))
        cuts = (np.cumsum(shares)[:-1] * len(rows)).astype(np.int64)
        owner[rows] = np.searchsorted(cuts, np.arange(len(rows)), side="right")
    return owner


def _shards(
    labels: np.ndarray, num_clients: int, shards_per_client: int, rng: np.random.Generator
) -> np.ndarray:
    shuffled = rng.permutation(len(labels))  # so that equal labels come in a seeded order
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    num_shards = num_clients * shards_per_client
    owner_of_shard = rng.permutation(num_shards) % num_clients
    owner = np.empty(len(labels), dtype=np.int64)
    for shard, rows in enumerate(np.array_split(by_label, num_shards)):
        owner[rows] = owner_of_shard[shard]
    return owner


def numbered(num_clients: int) -> tuple[str, ...]:
    """Ids of clients that have no name: of equal width, so that sorting keeps their order."""
    width = len(str(num_clients - 1))
    return tuple(f"{i:0{width}d}" for i in range(num_clients))


def partition_with(partitioner: Any, dataset: Any) -> dict[str, np.ndarray]:
    """Deal rows out by any object with flwr-datasets' partitioner interface.

    Args:
        partitioner: Its `dataset` is assigned, then `num_partitions` read and
            `load_partition(i)` called for each.
        dataset: The training rows: a `datasets.Dataset`.

    Returns:
        Row numbers of `dataset` by client id.

    Raises:
        DataError: The partitioner gives a row to two clients.
    """
    partitioner.dataset = dataset.add_column(_ROW_COLUMN, list(range(len(dataset))))
    num_partitions = int(partitioner.num_partitions)
    parts = {
        name: np.sort(np.asarray(partitioner.load_partition(i)[_ROW_COLUMN], dtype=np.int64))
        for i, name in enumerate(numbered(num_partitions))
    }
    times = np.bincount(np.concatenate([*parts.values()]), minlength=len(dataset))
    if times.max(initial=0) > 1:
        raise DataError(
            f"{type(partitioner).__name__} gives row {int(times.argmax()) + 1} to more than one "
            "client: take a partitioner that gives each row to one."
        )
    return parts


def cap_rows(parts: Mapping[str, np.ndarray], population: ClientsConfig) -> dict[str, np.ndarray]:
    """Draw `max_rows` rows of each client that has more, in their order; 0 leaves all.

    What is drawn depends on the seed of the partition, on the client's id and on how many rows it
    has: it is the same in every round, and on every machine that deals these rows out.
    """
    most = population.max_rows
    if not most:
        return dict(parts)
    capped = {}
    for name, rows in parts.items():
        if len(rows) > most:
            rng = np.random.default_rng(derive_seed("max-rows", population.seed, name))
            rows = rows[np.sort(rng.choice(len(rows), most, replace=False))]
        capped[name] = rows
    return capped


def drop_small_clients(
    parts: Mapping[str, np.ndarray], num_rows: int, population: ClientsConfig
) -> Clients:
    """Leave out the clients with fewer than `min_rows` rows, and count what is left out.

    Raises:
        DataError: No client is left.
    """
    clients = tuple(
        Client(name, parts[name])
        for name in sorted(parts)
        if len(parts[name]) >= population.min_rows
    )
    if not clients:
        largest = max((len(rows) for rows in parts.values()), default=0)
        raise DataError(
            f"none of {len(parts)} clients has clients.min-rows = {population.min_rows} rows; "
            f"the largest has {largest}. Ask for fewer rows a client, add rows, or share the "
            f"{num_rows} rows among fewer clients."
        )
    kept_rows = sum(len(client.rows) for client in clients)
    return Clients(clients, len(parts) - len(clients), num_rows - kept_rows)
