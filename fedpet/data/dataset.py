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
from fedpet.data.column import Column, Selection
from fedpet.data.partition import (
    Client,
    Clients,
    drop_small_clients,
    group_rows,
    name_of_client,
    partition,
    partition_with,
)
from fedpet.data.row_hash import choose_rows, hash_rows, hold_out_own
from fedpet.data.rows import Rows, no_rows
from fedpet.data.sources import Files, Source, open_source
from fedpet.data.split_table import Table
from fedpet.data.task import Task, check_label_names, encode_labels, read_off_label_names
from fedpet.data.tokenize import check_texts, hash_tokenizer, hash_tokenizer_files, tokenize_rows
from fedpet.errors import ConfigError, DataError

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
        train_split = held_split = _Split(source, data.train_split, "all", data.max_train_rows)
    else:
        train_split, held_split = _splits(source, data)
    source.check(train_split.name)
    if evaluation:
        source.check(held_split.name)

    task = Task(data.task, _label_names(train_split, data, cache), data.metric, data.metrics)
    tokens_key = {"tokenizer": hash_tokenizer_files(tokenizer_folder), "by": _versions()}

    def rows_entry(split: _Split) -> Entry:
        return _rows_entry(split, data, task, tokenizer_folder, tokens_key, cache, on_rows)

    train_entry = rows_entry(train_split)
    train = _rows(train_entry, data)
    held_entry = rows_entry(held_split) if evaluation else None
    held = _rows(held_entry, data) if held_entry else no_rows(train)
    if held_entry and partitioner is None and population.partition == "column":
        owners = _owners(held_split, held_entry, population.client_column, cache)
        held = replace(held, clients=owners)

    if partitioner is not None:
        dataset = source.read(data.train_split).dataset()
        parts = partition_with(partitioner, dataset.select(train_entry.arrays["numbers"]))
    elif population.partition == "column":
        parts = _natural_clients(train_split, train_entry, population.client_column, cache)
    else:
        parts = partition(train.labels, population)
    unowned = len(train) - sum(map(len, parts.values()))
    parts, held_out = _hold_out_own(train_split, train_entry, parts, data, population, cache)
    kept = _with_held_out(drop_small_clients(parts, len(train), population), held_out)
    books = {
        "train": _books(
            train_entry,
            "data.max-train-rows",
            {
                "of no client": unowned,
                "of clients below clients.min-rows": kept.left_out_rows - unowned,
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
        tokenizer_hash=tokenizer_hash,
        books=books,
    )


def _hold_out_own(
    split: _Split,
    rows_entry: Entry,
    parts: dict[str, np.ndarray],
    data: DataConfig,
    population: ClientsConfig,
    cache: Path,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the rows of each client to train on, and those that it holds out."""
    if not population.eval_fraction:
        return parts, {}
    numbers = rows_entry.arrays["numbers"]

    def compute() -> Entry:
        hashes = hash_rows(split.texts(data.text_columns), part=1)
        return Entry({"hashes": hashes[numbers]}, {})

    digest = hashlib.sha256(numbers.tobytes()).hexdigest()
    key = {**split.source.identity(split.name), "numbers": digest, "columns": data.text_columns}
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
    split = _Split(source, data.eval_split or data.train_split, part, data.max_eval_rows)
    source.check(split.name)
    task = Task(data.task, _label_names(split, data, cache), data.metric, data.metrics)
    tokens_key = {"tokenizer": hash_tokenizer_files(tokenizer_folder), "by": _versions()}
    entry = _rows_entry(split, data, task, tokenizer_folder, tokens_key, cache, on_rows)
    held, books = _rows(entry, data), {"evaluation": _books(entry, "data.max-eval-rows")}
    tokenizer_hash = hash_tokenizer(tokenizer_folder)
    return FederatedData(task, no_rows(held), held, (), 0, 0, tokenizer_hash, books)


def _no_data(data: DataConfig, tokenizer_folder: Path) -> FederatedData:
    """Return the task and the tokeniser of a server that has no rows."""
    check_label_names(data)
    if data.task == "classification" and not data.label_names:
        raise ConfigError(
            "data.eval-on is 'clients', so the server reads no rows and cannot read the classes "
            "off them: name all classes in data.label-names."
        )
    task = Task(data.task, data.label_names, data.metric, data.metrics)
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
    train, _ = _splits(source, data)
    source.check(train.name)
    task = Task(data.task, _label_names(train, data, cache), data.metric, data.metrics)

    def compute() -> Entry:
        texts, labels = train.texts(data.text_columns), train.labels(data.label_column)
        for name, column in zip(data.text_columns, texts, strict=True):
            check_texts(column, name, train.where)
        encoded = encode_labels(labels, task.kind, task.label_names, train.where)
        numbers = train.choose(data, train.max_rows)
        return Entry({"labels": encoded[numbers], "numbers": numbers}, {})

    entry = cached(cache, "census", _rows_key(train, data, task), compute)
    if population.partition == "column":
        parts = _natural_clients(train, entry, population.client_column, cache)
    else:
        parts = partition(entry.arrays["labels"], population)
    parts, held_out = _hold_out_own(train, entry, parts, data, population, cache)
    clients = drop_small_clients(parts, len(entry.arrays["labels"]), population).clients
    return ClientCounts(
        task,
        {client.id: len(client.rows) for client in clients},
        {client.id: len(held_out.get(client.id, ())) for client in clients},
    )


@dataclass(frozen=True)
class _Split:
    """Some rows of a source."""

    source: Source
    name: str
    part: str  # "all", or by the hash of the text "kept" or "held out"
    max_rows: int  # 0 takes all

    @property
    def where(self) -> str:
        if isinstance(self.source, Files) and "" in self.source.files:
            return self.source.description
        return f"split {self.name!r} of {self.source.description}"

    def read(self) -> Table:
        return self.source.read(self.name)

    def texts(self, columns: Sequence[str]) -> list[Column]:
        """Read the columns of texts.

        Raises:
            DataError: A column that is not there, or whose entries are numbers all.
        """
        table = self.read()
        texts = [table.column(name, "data.text-columns", self.where) for name in columns]
        for name, column in zip(columns, texts, strict=True):
            if not table.typed and all(text and _is_number(text) for text in column):
                raise DataError(
                    f"row 1 of {self.where} has {column[0]} in column {name!r}, and every row a "
                    "number, where a text should be: check data.text-columns."
                )
        return texts

    def labels(self, column: str) -> Column:
        """Read all labels; a class index of the source's numbering as the name it stands for."""
        return self.read().labels(column, "data.label-column", self.where)

    def choose(self, data: DataConfig, max_rows: int) -> np.ndarray:
        """Return the numbers of its rows, int64 (k,), ascending; their texts are checked."""
        table, hashes = self.read(), None
        if self.part != "all" or 0 < max_rows < table.num_rows:
            hashes = table.hashes(data.text_columns, self.where)
        return choose_rows(table.num_rows, hashes, self.part, data.eval_fraction, max_rows)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _splits(source: Source, data: DataConfig) -> tuple[_Split, _Split]:
    """Return the rows to train on, and those to evaluate on."""
    if data.eval_on == "clients":
        every = _Split(source, data.train_split, "all", data.max_train_rows)
        return every, every
    if not data.eval_split or (isinstance(source, Files) and "" in source.files):
        return (
            _Split(source, data.train_split, "kept", data.max_train_rows),
            _Split(source, data.train_split, "held out", data.max_eval_rows),
        )
    return (
        _Split(source, data.train_split, "all", data.max_train_rows),
        _Split(source, data.eval_split, "all", data.max_eval_rows),
    )


def _label_names(train: _Split, data: DataConfig, cache: Path) -> tuple[str, ...]:
    """Return the classes as configured, by the source, or of the rows; () for a regression."""
    check_label_names(data)
    if data.label_names or data.task == "regression":
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


def _rows_key(split: _Split, data: DataConfig, task: Task) -> dict[str, Any]:
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
    }


def _rows_entry(
    split: _Split,
    data: DataConfig,
    task: Task,
    tokenizer_folder: Path,
    tokens_key: dict[str, Any],
    cache: Path,
    on_rows: OnRows,
) -> Entry:
    key = {**tokens_key, **_rows_key(split, data, task), "max_length": data.max_length}

    def compute() -> Entry:
        where = split.where
        texts, labels = split.texts(data.text_columns), split.labels(data.label_column)
        for name, column in zip(data.text_columns, texts, strict=True):
            check_texts(column, name, where)
            _check_unicode(column, name, where)
        encoded = encode_labels(labels, task.kind, task.label_names, where)
        numbers = split.choose(data, split.max_rows)
        if not len(numbers):
            raise DataError(
                f"no row of the {len(labels)} in {where} is {split.part} at data.eval-fraction "
                f"{data.eval_fraction}: change the fraction, or add rows."
            )
        chosen, total = [Selection(column, numbers) for column in texts], len(numbers)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            arrays, padding = tokenize_rows(
                chosen,
                tokenizer_folder,
                data.max_length,
                where,
                cache,
                lambda done: on_rows(done, total),
            )
        except OSError as error:
            raise unwritable(cache, error) from None
        told = {
            "padding": asdict(padding),
            "part": split.part,
            "num_rows": len(labels),
            "num_rows_of_part": len(split.choose(data, 0)),
            "left_out": split.read().left_out,
        }
        return Entry(arrays | {"labels": encoded[numbers], "numbers": numbers}, told)

    return cached(cache, "rows", key, compute)


def _check_unicode(texts: Column, column: str, where: str) -> None:
    """Refuse the first text with half a surrogate pair, which no tokeniser takes."""
    for row, text in enumerate(texts) if not texts.is_text else ():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"row {row + 1} of {where} has a text in column {column!r} that is no Unicode, "
                f"{text[:40]!a}: mend or remove the row."
            ) from None


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
    )


def _natural_clients(
    split: _Split, rows_entry: Entry, column: str, cache: Path
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


def _owners(split: _Split, rows_entry: Entry, column: str, cache: Path) -> np.ndarray | None:
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
