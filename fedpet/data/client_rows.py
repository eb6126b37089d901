"""Find the clients that rows name, and the rows that each holds out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedpet.config import ClientsConfig, DataConfig
from fedpet.data.cache import Entry, cached
from fedpet.data.partition import Clients, group_rows, name_of_client
from fedpet.data.row_hash import hash_rows, hold_out_own
from fedpet.data.split_rows import Split
from fedpet.errors import DataError
from fedpet.tasks import kind_of

__all__ = ["held_out_by_clients", "natural_clients", "owners_of", "with_held_out"]


def natural_clients(
    split: Split, rows_entry: Entry, column: str, cache: Path
) -> dict[str, np.ndarray]:
    numbers = rows_entry.arrays["numbers"]

    def compute() -> Entry:
        values = split.read().column(
            column, "clients.client-column, or another clients.partition", split.where
        )
        found, codes = values.distinct()
        ids = [name_of_client(value) for value in found]
        nameless = np.array([name is None for name in ids])[codes]
        if nameless.any():
            raise DataError(
                f"row {int(nameless.argmax()) + 1} of {split.where} names no client in column "
                f"{column!r}: give every row a client, or take another clients.partition."
            )
        codes = codes[numbers]
        names = sorted({str(ids[code]) for code in np.unique(codes)})
        place_of = {name: place for place, name in enumerate(names)}
        places = np.array([place_of.get(str(name), -1) for name in ids], dtype=np.int32)
        return Entry({"codes": places[codes]}, {"names": names})

    digest = hashlib.sha256(numbers.tobytes()).hexdigest()
    key = {**split.source.identity(split.name), "numbers": digest, "column": column}
    entry = cached(cache, "clients", key, compute)
    return group_rows(entry.arrays["codes"], tuple(entry.meta["names"]))


def owners_of(split: Split, rows_entry: Entry, column: str, cache: Path) -> np.ndarray | None:
    """Return the client of each evaluation row, as a number; None where they name none."""
    numbers = rows_entry.arrays["numbers"]

    def compute() -> Entry:
        try:
            clients = natural_clients(split, rows_entry, column, cache)
        except DataError:  # they need not have the column, as training rows must
            return Entry({"owners": np.empty(0, dtype=np.int32)}, {})
        owners = np.empty(len(numbers), dtype=np.int32)
        for number, rows in enumerate(clients.values()):
            owners[rows] = number
        return Entry({"owners": owners}, {})

    digest = hashlib.sha256(numbers.tobytes()).hexdigest()
    key = {**split.source.identity(split.name), "numbers": digest, "column": column}
    owners: np.ndarray = cached(cache, "owners", key, compute).arrays["owners"]
    return owners if len(owners) else None


def held_out_by_clients(
    split: Split,
    rows_entry: Entry,
    parts: dict[str, np.ndarray],
    data: DataConfig,
    population: ClientsConfig,
    cache: Path,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the rows of each client to train on, and those that it holds out."""
    if not population.eval_fraction:
        return parts, {}
    numbers, columns = rows_entry.arrays["numbers"], kind_of(data.task).columns(data)

    def compute() -> Entry:
        table = split.read()
        read = [table.column(name, "data.text-columns", split.where) for name in columns]
        hashes = hash_rows(read, part=1)
        return Entry({"hashes": hashes[numbers]}, {})

    digest = hashlib.sha256(numbers.tobytes()).hexdigest()
    key = {**split.source.identity(split.name), "numbers": digest, "columns": columns}
    hashes = cached(cache, "own-hashes", key, compute).arrays["hashes"]
    return hold_out_own(parts, hashes, population.eval_fraction, population.min_rows)


def with_held_out(kept: Clients, held_out: Mapping[str, np.ndarray]) -> Clients:
    """Add the rows that clients hold out, which are not left out of the run."""
    clients = tuple(
        replace(client, held_out=held_out[client.id]) if client.id in held_out else client
        for client in kept.clients
    )
    held = sum(len(client.held_out) for client in clients)
    return replace(kept, clients=clients, left_out_rows=kept.left_out_rows - held)
