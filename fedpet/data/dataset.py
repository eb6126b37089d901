"""Load the rows and clients that a configuration names.

In:  `DataConfig`, `ClientsConfig`, the tokeniser's folder, the cache's root.
Out: a `FederatedData`.

Each split is tokenised once. Its entry in the cache is named after the source's bytes, the
tokeniser's bytes and the settings that decide a token or a label, so a second start opens it and
reads no text. Clients are dealt out each time, and with all rows tokenised nothing that depends on
the population is kept. With `clients.max-rows` the rows are dealt out first: only those of clients
that take part are tokenised, and the entry is named after their numbers as well.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedpet.config import ClientsConfig, DataConfig
from fedpet.data.cache import Entry
from fedpet.data.client_rows import owners_of, with_held_out
from fedpet.data.dealt_rows import bare_rows, deal_rows
from fedpet.data.encoded_rows import OnRows, pack, rows_entry, rows_of, task_of
from fedpet.data.local_files import Files
from fedpet.data.open_source import open_source
from fedpet.data.partition import Client, drop_small_clients
from fedpet.data.row_books import RowBooks, count_rows
from fedpet.data.rows import Rows, no_rows
from fedpet.data.split_rows import Split, train_and_held_out
from fedpet.errors import ConfigError
from fedpet.tasks import Task, kind_of, portable_name
from fedpet.tasks.class_labels import check_label_names

__all__ = ["FederatedData", "load_data", "load_evaluation"]


@dataclass(frozen=True, eq=False)
class FederatedData:
    """All a federation's data, as one process sees it."""

    task: Task
    train: Rows
    evaluation: Rows
    clients: tuple[Client, ...]  # sorted by id; their rows are of `train`
    left_out_clients: int  # with fewer than min_rows rows
    left_out_rows: int  # of the training split, that no client holds; with max_rows not in `train`
    tokenizer_hash: str  # 64 hex digits
    books: Mapping[str, RowBooks] = field(default_factory=dict)  # of "train" and "evaluation"


def load_data(
    data: DataConfig,
    population: ClientsConfig,
    tokenizer_folder: Path,
    *,
    cache: Path,
    evaluation: bool = True,
    all_rows: bool = False,
    partitioner: Any = None,
    on_rows: OnRows = lambda done, total: None,
) -> FederatedData:
    """Load, tokenise and deal out the rows of an experiment.

    Args:
        data: What to read. With `eval_split` "" or a single file, `eval_fraction` of the rows
            are held out by a hash of their text, so equal texts fall on the same side. A limit
            on rows takes those with the smallest such hashes: a sample, the same everywhere. With
            `eval_on` "clients" there are no evaluation rows.
        population: How rows become clients.
        tokenizer_folder: The backbone's local folder.
        cache: Root of the cache.
        evaluation: False leaves `FederatedData.evaluation` empty and its split unread. The
            training rows are the same either way.
        all_rows: True trains on every row of the training split, or of the single file: a node's
            own rows, with the evaluation rows elsewhere.
        partitioner: Any object with flwr-datasets' interface; deals the rows out in place of
            `clients.partition`.
        on_rows: Is called while rows are tokenised, with how many are and how many there are.

    Returns:
        The rows of both splits and the clients that take part.

    Raises:
        DataError: Rows, columns, labels or clients that cannot be used.
        ConfigError: Settings that contradict each other or the data.
    """
    if population.partition == "nodes":
        raise ConfigError(
            'clients.partition is "nodes", which leaves the clients to nodes with rows of their '
            "own: give each node its rows with --node-config 'data=\"FILE\"', or name another "
            "partition to simulate."
        )
    cache, tokenizer_folder = Path(cache), Path(tokenizer_folder)
    tokenizer_hash = kind_of(data.task).tokenizer_hash(tokenizer_folder)
    source = open_source(data.source)
    evaluation = evaluation and data.eval_on == "server"
    if all_rows:
        assert not evaluation, "rows that are all trained on leave none to evaluate on"
        train_split = held_split = Split(source, data.train_split, "all", data.max_train_rows)
    else:
        train_split, held_split = train_and_held_out(source, data)
    source.check(train_split.name)
    if evaluation:
        source.check(held_split.name)

    task = task_of(train_split, data, cache)
    kind = kind_of(task)
    encoding = (data, task, tokenizer_folder, cache, on_rows)
    read = functools.cache(functools.partial(kind.read, train_split, data, task))
    dealing = (data, population, cache, partitioner)
    if population.max_rows:  # most rows may take no part
        bare = bare_rows(train_split, data, task, cache, read)
        dealt = deal_rows(train_split, bare, *dealing)
        taking = dealt.taking_part(population, min_rows=1 if kind.packs else population.min_rows)
        dealt = dealt.among(taking)
        train_entry = rows_entry(
            train_split, *encoding, read=read, taking=bare.arrays["numbers"][taking]
        )
    else:
        train_entry = rows_entry(train_split, *encoding, read=read)
        dealt = deal_rows(train_split, train_entry, *dealing)
    del read  # the rows as they were read
    held_entry = rows_entry(held_split, *encoding) if evaluation else None
    owners = None
    if held_entry and partitioner is None and population.partition == "column":
        owners = owners_of(held_split, held_entry, population.client_column, cache)

    parts, held_out = dealt.parts, dealt.held_out
    train, examples = rows_of(train_entry, data), parts
    if kind.packs:
        train, examples, own = _pack_clients(train_entry, parts, held_out, data, cache)
        short = [n for n in own if len(own[n]) and len(examples[n]) < population.min_rows]
        for name in short:  # rows were counted, and examples are what is trained on
            parts[name] = np.union1d(parts[name], held_out[name])
            held_out[name] = held_out[name][:0]
        if short:
            train, examples, own = _pack_clients(train_entry, parts, held_out, data, cache)
        held_out = own
    count = len(train) if kind.packs else dealt.num_rows
    kept = with_held_out(drop_small_clients(examples, count, population), held_out)
    held = no_rows(train)
    if held_entry and kind.packs:
        held = _pack_evaluation(held_entry, owners, data, cache)
    elif held_entry:
        held = replace(rows_of(held_entry, data), clients=owners)
    taking_part = {client.id for client in kept.clients}
    small = sum(len(rows) for name, rows in parts.items() if name not in taking_part)
    books = {
        "train": count_rows(
            train_entry,
            "data.max-train-rows",
            {
                "of no client": dealt.unowned,
                "beyond clients.max-rows": dealt.beyond,
                "of clients below clients.min-rows": small,
            },
            dealt.num_rows,
        )
    }
    if held_entry:
        books["evaluation"] = count_rows(held_entry, "data.max-eval-rows")
    return FederatedData(
        task=task,
        train=train,
        evaluation=held,
        clients=kept.clients,
        left_out_clients=kept.left_out_clients,
        left_out_rows=kept.left_out_rows,
        tokenizer_hash=tokenizer_hash,
        books=books,
    )


def load_evaluation(
    data: DataConfig,
    tokenizer_folder: Path,
    *,
    cache: Path,
    client_column: str = "",
    on_rows: OnRows = lambda done, total: None,
) -> FederatedData:
    """Load a server's rows, where the training rows are on the nodes: it evaluates on them.

    Args:
        data: What to read: the whole of a single file, or `eval_split`; where that is "", the rows
            of `train_split` that a simulation would hold out. Without `label_names`, the classes
            are read off these rows.
        tokenizer_folder: The backbone's local folder.
        cache: Root of the cache.
        client_column: Where the rows have it, a task that packs cuts each client's by themselves.
        on_rows: As in `load_data`.

    Returns:
        Evaluation rows; no training rows, and no clients. No row at all, and nothing is read, with
        `eval_on` "clients".

    Raises:
        DataError: Rows, columns or labels that cannot be used.
        ConfigError: The classes are to be read off rows, and there are none.
    """
    if data.eval_on == "clients":
        return _no_data(data, tokenizer_folder)
    source = open_source(data.source)
    single = isinstance(source, Files) and "" in source.files
    part = "all" if single or data.eval_split else "held out"
    split = Split(source, data.eval_split or data.train_split, part, data.max_eval_rows)
    source.check(split.name)
    task = task_of(split, data, cache)
    entry = rows_entry(split, data, task, tokenizer_folder, cache, on_rows)
    kind, held = kind_of(task), rows_of(entry, data)
    if kind.packs:
        owners = owners_of(split, entry, client_column, cache) if client_column else None
        held = _pack_evaluation(entry, owners, data, cache)
    books = {"evaluation": count_rows(entry, "data.max-eval-rows")}
    tokenizer_hash = kind.tokenizer_hash(tokenizer_folder)
    return FederatedData(task, no_rows(held), held, (), 0, 0, tokenizer_hash, books)


def _pack_clients(
    entry: Entry,
    parts: Mapping[str, np.ndarray],
    held_out: Mapping[str, np.ndarray],
    data: DataConfig,
    cache: Path,
) -> tuple[Rows, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Cut the rows of each client into examples, and what it holds out into others."""
    train, cut = pack(entry, [*parts.values(), *held_out.values()], data, cache)
    examples = dict(zip(parts, cut[: len(parts)], strict=True))
    return train, examples, dict(zip(held_out, cut[len(parts) :], strict=True))


def _pack_evaluation(
    entry: Entry, owners: np.ndarray | None, data: DataConfig, cache: Path
) -> Rows:
    """Cut evaluation rows into examples, a client's by themselves where they name one."""
    if owners is None:
        return pack(entry, [np.arange(len(entry.arrays["labels"]))], data, cache)[0]
    clients = np.unique(owners)
    held, cut = pack(entry, [np.flatnonzero(owners == one) for one in clients], data, cache)
    counts = [len(rows) for rows in cut]
    return replace(held, clients=np.repeat(clients, counts).astype(np.int32))


def _no_data(data: DataConfig, tokenizer_folder: Path) -> FederatedData:
    """Return the task and the tokeniser of a server that has no rows."""
    check_label_names(data)
    if kind_of(data.task).has_classes and not data.label_names:
        raise ConfigError(
            "data.eval-on is 'clients', so the server reads no rows and cannot read the classes "
            "off them: name all classes in data.label-names."
        )
    task = Task(portable_name(data.task), data.label_names, data.metric, data.metrics)
    kind = np.float32 if data.task == "regression" else np.int64
    nothing = Rows(
        tokens=np.empty(0, dtype=np.int32),
        offsets=np.zeros(1, dtype=np.int64),
        labels=np.empty(0, dtype=kind),
        types=None,
        pad_id=0,
    )
    return FederatedData(
        task, nothing, nothing, (), 0, 0, kind_of(task).tokenizer_hash(tokenizer_folder)
    )
