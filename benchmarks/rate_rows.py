"""Deal out the rows of six data sets to clients of at most 40 rows, for the grid of rates."""

from __future__ import annotations

import collections
import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedpet.backbone.pretrained import locate
from fedpet.client.node_config import make_cache
from fedpet.config import BackboneConfig, ClientsConfig, DataConfig, Experiment
from fedpet.data import FederatedData, load_data
from fedpet.errors import ConfigError

__all__ = ["ACCURACY", "BACKBONE", "ROWS", "SOURCES", "load", "write_rows"]

ROWS, MOST_CLIENTS = 40, 160
ACCURACY = "accuracy"
BACKBONE = BackboneConfig()


@dataclass(frozen=True)
class Source:
    """A data set: folder, column of its clients ("" deals them out), rows to report on, metric."""

    folder: str
    column: str
    test: str = "test"
    metric: str = ACCURACY


SOURCES = {
    "films": Source("rotten_tomatoes_movies", "movie"),
    "airline": Source("airline_tweets", "airline"),
    "enron": Source("enron_spam_mailboxes", "mailbox"),
    "domains": Source("multidomain_sentiment", "domain"),
    "cola": Source("cola", "source", "validation", "matthews"),
    "banking77": Source("banking77", ""),
}


def load(data: Path, name: str, split: str) -> FederatedData:
    """Read a data set's clients, and one split to evaluate on."""
    cache = make_cache(Experiment())
    folder = cache / "benchmarks" / "rate_grid" / name
    if not (folder / "test.jsonl").exists():
        write_rows(data, name, folder)
    return load_data(
        DataConfig(source=str(folder), eval_split=split, metric=SOURCES[name].metric),
        ClientsConfig(min_rows=8),
        locate(BACKBONE),
        cache=cache,
    )


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Read a split.

    Raises:
        ConfigError: There is none.
    """
    if not file.exists():
        raise ConfigError(f"there is no file {str(file)!r}: name the folder of the sets by --data.")
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_rows(data: Path, name: str, folder: Path) -> None:
    """Deal out the training rows to small clients, and write three splits."""
    source, generator = SOURCES[name], np.random.default_rng(7)
    rows = read_rows(data / source.folder / "train.jsonl.gz")
    test = read_rows(data / source.folder / f"{source.test}.jsonl.gz")
    rows = [rows[i] for i in generator.permutation(len(rows))]
    if name == "films":  # validated on films that no client has
        by_film = grouped(rows, source.column)
        validation: list[dict[str, Any]] = []
        names = sorted(by_film)
        names = [names[i] for i in generator.permutation(len(names))]
        while len(validation) < 900:
            validation += by_film[names.pop(0)]
        clients = [(name, by_film[name][:ROWS]) for name in names if len(by_film[name]) >= 16]
    else:
        validation, rows = rows[:900], rows[900:]
        clients = list(by_column(rows, source.column)) if source.column else dealt(rows, generator)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [clients[i] for i in generator.permutation(len(clients))][:MOST_CLIENTS]
    write(folder / "train.jsonl", [(row, client) for client, own in chosen for row in own])
    write(folder / "validation.jsonl", [(row, "") for row in validation[:800]])
    order_of_test = generator.permutation(len(test))
    write(folder / "test.jsonl", [(test[i], "") for i in order_of_test[:1500]])


def grouped(rows: Sequence[Any], column: str) -> dict[str, list[Any]]:
    """Return rows by the value of a column."""
    found: dict[str, list[Any]] = collections.defaultdict(list)
    for row in rows:
        found[row[column]].append(row)
    return found


def by_column(rows: Sequence[Any], column: str) -> Iterator[tuple[str, list[Any]]]:
    """Yield clients of so many rows of one value of a column each."""
    for name, own in sorted(grouped(rows, column).items()):
        for start in range(0, len(own) - ROWS + 1, ROWS):
            yield f"{name}-{start // ROWS}", own[start : start + ROWS]


def dealt(rows: Sequence[Any], generator: np.random.Generator) -> list[tuple[str, list[Any]]]:
    """Deal rows out: each client's classes follow a Dirichlet distribution of 0.1."""
    pools = grouped(rows, "label")
    labels = sorted(pools)
    clients: list[tuple[str, list[Any]]] = []
    while len(clients) < 150:
        shares = generator.dirichlet([0.1] * len(labels))
        left = np.array([len(pools[label]) for label in labels])
        shares = shares * (left > 0)
        if left.sum() < ROWS or not shares.sum():
            break
        counts = generator.multinomial(ROWS, shares / shares.sum())
        own = [
            pools[label].pop()
            for label, count in zip(labels, counts, strict=True)
            for _ in range(min(count, len(pools[label])))
        ]
        if len(own) >= 16:
            clients.append((f"c{len(clients)}", own))
    return clients


def write(file: Path, rows: Sequence[tuple[dict[str, Any], str]]) -> None:
    """Write rows with their clients."""
    lines = [
        json.dumps({"text": row["text"], "label": row["label"], "client": client})
        for row, client in rows
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
