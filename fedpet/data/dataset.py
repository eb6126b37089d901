"""Load the rows and clients that a configuration names.

In:  `DataConfig`, `ClientsConfig`, the tokeniser's folder, the cache's root.
Out: a `FederatedData`.

Each split is tokenised once. Its entry in the cache is named after the source's bytes, the
tokeniser's bytes and the settings that decide a token or a label, so a second start opens it and
reads no text. Nothing that depends on the population is kept: clients are dealt out each time.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedpet.config import ClientsConfig, DataConfig
from fedpet.data.cache import Entry, cached, unwritable
from fedpet.data.collator import COLLATORS
from fedpet.data.partition import (
    Client,
    Clients,
    cap_rows,
    drop_small_clients,
    group_rows,
    name_of_client,
    partition,
    partition_with,
)
from fedpet.data.row_hash import hash_rows, hold_out_own
from fedpet.data.rows import Rows, no_rows
from fedpet.data.sources import Files, open_source
from fedpet.data.split_rows import Split, train_and_held_out
from fedpet.data.tokenize import hash_tokenizer, hash_tokenizer_files
from fedpet.errors import ConfigError, DataError
from fedpet.tasks import Task, kind_of, portable_name
from fedpet.tasks.class_labels import check_label_names, read_off_label_names

OnRows = Callable[[int, int], None]  # rows done, rows in all


@dataclass(frozen=True)
class RowBooks:
    """Counts of a split's rows: those used and those left out add up to those read."""

    read: int
    used: int
    left_out: Mapping[str, int]  # by the reason


@dataclass(frozen=True, eq=False)
class FederatedData:
    """All a federation's data, as one process sees it."""

    task: Task
    train: Rows
    evaluation: Rows
    clients: tuple[Client, ...]  # sorted by id; their rows are of `train`
    left_out_clients: int  # with fewer than min_rows rows
    left_out_rows: int  # of `train`, that no client holds
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
    tokenizer_hash = hash_tokenizer(tokenizer_folder)
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

    task = _task(train_split, data, cache)
    kind = kind_of(task)
    tokens_key = {"tokenizer": hash_tokenizer_files(tokenizer_folder), "by": _versions()}

    def rows_entry(split: Split) -> Entry:
        return _rows_entry(split, data, task, tokenizer_folder, tokens_key, cache, on_rows)

    train_entry = rows_entry(train_split)
    held_entry = rows_entry(held_split) if evaluation else None
    owners = None
    if held_entry and partitioner is None and population.partition == "column":
        owners = _owners(held_split, held_entry, population.client_column, cache)

    if partitioner is not None:
        dataset = source.read(data.train_split).dataset()
        parts = partition_with(partitioner, dataset.select(train_entry.arrays["numbers"]))
    elif population.partition == "column":
        parts = _natural_clients(train_split, train_entry, population.client_column, cache)
    else:
        parts = partition(train_entry.arrays["labels"], population)
    num_rows = len(train_entry.arrays["labels"])
    unowned = num_rows - sum(map(len, parts.values()))
    parts = cap_rows(parts, population)
    beyond = num_rows - unowned - sum(map(len, parts.values()))
    parts, held_out = _hold_out_own(train_split, train_entry, parts, data, population, cache)
    train, examples = _rows(train_entry, data), parts
    if kind.packs:
        groups = [*parts.values(), *held_out.values()]
        train, cut = _packed(train_entry, groups, data, cache)
        examples = dict(zip(parts, cut[: len(parts)], strict=True))
        held_out = dict(zip(held_out, cut[len(parts) :], strict=True))
    kept = _with_held_out(drop_small_clients(examples, len(train), population), held_out)
    held = no_rows(train)
    if held_entry and kind.packs:
        groups = [np.arange(len(held_entry.arrays["labels"]))]
        if owners is not None:
            groups = [np.flatnonzero(owners == owner) for owner in np.unique(owners)]
        held, cut = _packed(held_entry, groups, data, cache)
        if owners is not None:
            counts = [len(rows) for rows in cut]
            held = replace(held, clients=np.repeat(np.unique(owners), counts).astype(np.int32))
    elif held_entry:
        held = replace(_rows(held_entry, data), clients=owners)
    taking_part = {client.id for client in kept.clients}
    small = sum(len(rows) for name, rows in parts.items() if name not in taking_part)
    books = {
        "train": _books(
            train_entry,
            "data.max-train-rows",
            {
                "of no client": unowned,
                "beyond clients.max-rows": beyond,
                "of clients below clients.min-rows": small,
            },
        )
    }
    if held_entry:
        books["evaluation"] = _books(held_entry, "data.max-eval-rows")
    return FederatedData(
        task=task,
        train=train,
        evaluation=held,
        clients=kept.clients,
        left_out_clients=kept.left_out_clients,
        left_out_rows=kept.left_out_rows,
        tokenizer_hash=kind.tokenizer_hash(tokenizer_folder, tokenizer_hash),
        books=books,
    )


def _hold_out_own(
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


def _with_held_out(kept: Clients, held_out: Mapping[str, np.ndarray]) -> Clients:
    """Add the rows that clients hold out, which are not left out of the run."""
    clients = tuple(
        replace(client, held_out=held_out[client.id]) if client.id in held_out else client
        for client in kept.clients
    )
    held = sum(len(client.held_out) for client in clients)
    return replace(kept, clients=clients, left_out_rows=kept.left_out_rows - held)


def load_evaluation(
    data: DataConfig,
    tokenizer_folder: Path,
    *,
    cache: Path,
    on_rows: OnRows = lambda done, total: None,
) -> FederatedData:
    """Load a server's rows, where the training rows are on the nodes: it evaluates on them.

    Args:
        data: What to read: the whole of a single file, or `eval_split`; where that is "", the rows
            of `train_split` that a simulation would hold out. Without `label_names`, the classes
            are read off these rows.
        tokenizer_folder: The backbone's local folder.
        cache: Root of the cache.
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
    task = _task(split, data, cache)
    tokens_key = {"tokenizer": hash_tokenizer_files(tokenizer_folder), "by": _versions()}
    entry = _rows_entry(split, data, task, tokenizer_folder, tokens_key, cache, on_rows)
    kind, held = kind_of(task), _rows(entry, data)
    if kind.packs:
        held, _ = _packed(entry, [np.arange(len(held))], data, cache)
    books = {"evaluation": _books(entry, "data.max-eval-rows")}
    tokenizer_hash = kind.tokenizer_hash(tokenizer_folder, hash_tokenizer(tokenizer_folder))
    return FederatedData(task, no_rows(held), held, (), 0, 0, tokenizer_hash, books)


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
    return FederatedData(task, nothing, nothing, (), 0, 0, hash_tokenizer(tokenizer_folder))


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
    task = _task(train, data, cache)
    kind = kind_of(task)

    def compute() -> Entry:
        raw = kind.read(train, data, task)
        numbers = train.choose(data, train.max_rows)
        arrays = {"labels": raw.labels[numbers], "numbers": numbers}
        if kind.packs:
            arrays["sizes"] = kind.sizes(raw)[numbers]
        return Entry(arrays, {})

    entry = cached(cache, "census", _rows_key(train, data, task), compute)
    if population.partition == "column":
        parts = _natural_clients(train, entry, population.client_column, cache)
    else:
        parts = partition(entry.arrays["labels"], population)
    parts = cap_rows(parts, population)
    parts, held_out = _hold_out_own(train, entry, parts, data, population, cache)
    if kind.packs:  # reckoned: there is no tokeniser
        sizes = entry.arrays["sizes"]
        counts = {n: -(-int(sizes[rows].sum()) // data.max_length) for n, rows in parts.items()}
        parts = {name: np.broadcast_to(0, count) for name, count in counts.items()}
    clients = drop_small_clients(parts, len(entry.arrays["labels"]), population).clients
    return ClientCounts(
        task,
        {client.id: len(client.rows) for client in clients},
        {client.id: len(held_out.get(client.id, ())) for client in clients},
    )


def _task(split: Split, data: DataConfig, cache: Path) -> Task:
    names = _label_names(split, data, cache)
    return Task(portable_name(data.task), names, data.metric, data.metrics)


def _label_names(train: Split, data: DataConfig, cache: Path) -> tuple[str, ...]:
    """Return the classes as configured, by the source, or of the rows; () for none."""
    check_label_names(data)
    if data.label_names or not kind_of(data.task).has_classes:
        return data.label_names

    def compute() -> Entry:
        labels = train.labels(data.label_column)
        known = train.read().label_names(data.label_column)
        return Entry({}, {"label_names": read_off_label_names(labels, train.where, known)})

    key = {**train.source.identity(train.name), "label_column": data.label_column}
    return tuple(cached(cache, "labels", key, compute).meta["label_names"])


def _versions() -> list[str]:
    """Return the libraries' versions: a newer one may cut a text into other tokens."""
    return [importlib.metadata.version(name) for name in ("tokenizers", "transformers")]


def _rows_key(split: Split, data: DataConfig, task: Task) -> dict[str, Any]:
    """Return what decides which rows a split has, and their labels."""
    return {
        **split.source.identity(split.name),
        "part": split.part,
        "max_rows": split.max_rows,
        "eval_fraction": None if split.part == "all" else data.eval_fraction,
        "text_columns": data.text_columns,
        "label_column": data.label_column,
        "label_names": task.label_names,
        "task": task.kind,
        **kind_of(task).key(data),
    }


def _rows_entry(
    split: Split,
    data: DataConfig,
    task: Task,
    tokenizer_folder: Path,
    tokens_key: dict[str, Any],
    cache: Path,
    on_rows: OnRows,
) -> Entry:
    key = {**tokens_key, **_rows_key(split, data, task), "max_length": data.max_length}

    def compute() -> Entry:
        kind, where = kind_of(task), split.where
        raw = kind.read(split, data, task)
        numbers = split.choose(data, split.max_rows)
        if not len(numbers):
            raise DataError(
                f"no row of the {len(raw.labels)} in {where} is {split.part} at data.eval-fraction "
                f"{data.eval_fraction}: change the fraction, or add rows."
            )
        try:
            cache.mkdir(parents=True, exist_ok=True)
            arrays, padding = kind.encode(
                raw,
                numbers,
                data,
                tokenizer_folder,
                where=where,
                spools=cache,
                on_rows=lambda done: on_rows(done, len(numbers)),
            )
        except OSError as error:
            raise unwritable(cache, error) from None
        told = {
            "padding": asdict(padding),
            "part": split.part,
            "num_rows": len(raw.labels),
            "num_rows_of_part": len(split.choose(data, 0)),
            "left_out": split.read().left_out,
        }
        return Entry(arrays | {"numbers": numbers}, told)

    return cached(cache, "rows", key, compute)


_OTHER_PART = {"kept": "held out to evaluate on", "held out": "kept to train on"}


def _books(entry: Entry, limit: str, more: Mapping[str, int] | None = None) -> RowBooks:
    """Count the rows of a split that are used, and those left out by the reason.

    Args:
        entry: Of the split.
        limit: The setting that limits its rows.
        more: Rows of the entry that are not used, by the reason.
    """
    told, num_rows = entry.meta, len(entry.arrays["labels"])
    left_out = {
        **told["left_out"],
        _OTHER_PART.get(told["part"], ""): told["num_rows"] - told["num_rows_of_part"],
        f"beyond {limit}": told["num_rows_of_part"] - num_rows,
        **(more or {}),
    }
    return RowBooks(
        read=told["num_rows"] + sum(told["left_out"].values()),
        used=num_rows - sum((more or {}).values()),
        left_out={reason: count for reason, count in left_out.items() if count},
    )


def _rows(entry: Entry, data: DataConfig) -> Rows:
    return Rows(
        tokens=entry.arrays["tokens"],
        offsets=entry.arrays["offsets"],
        labels=entry.arrays["labels"],
        types=entry.arrays.get("types"),
        pad_id=entry.meta["padding"]["token"],
        pad_left=entry.meta["padding"]["left"],
        collator=COLLATORS.find(data.collator) if data.collator else None,
        marks=entry.arrays.get("marks"),
        decoder_start=int(entry.arrays.get("decoder_start", [-1])[0]),
    )


def _packed(
    entry: Entry, groups: Sequence[np.ndarray], data: DataConfig, cache: Path
) -> tuple[Rows, list[np.ndarray]]:
    """Cut each group's rows into examples; return them, and the numbers of each group's own."""
    kind = kind_of(data.task)

    def compute() -> Entry:
        arrays, counts = kind.arrange({**entry.arrays}, groups, data)
        return Entry(arrays | {"counts": counts}, entry.meta)

    digest = hashlib.sha256()
    for part in (*groups, entry.arrays["tokens"], entry.arrays["offsets"]):
        digest.update(len(part).to_bytes(8, "big") + np.ascontiguousarray(part).data)
    key = {"rows": digest.hexdigest(), "max_length": data.max_length, **kind.key(data)}
    packed = cached(cache, "packed", {**key, "task": data.task}, compute)
    ends = np.cumsum(packed.arrays["counts"])
    return _rows(packed, data), np.split(np.arange(ends[-1] if len(ends) else 0), ends[:-1])


def _natural_clients(
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


def _owners(split: Split, rows_entry: Entry, column: str, cache: Path) -> np.ndarray | None:
    """Return the client of each evaluation row, as a number; None where they name none."""
    numbers = rows_entry.arrays["numbers"]

    def compute() -> Entry:
        try:
            clients = _natural_clients(split, rows_entry, column, cache)
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
