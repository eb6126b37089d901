"""Turn the rows of a split into examples of a task, once: the cache has them afterwards.

In:  a `Split`, the settings, the folder of the tokeniser.
Out: an `Entry` of arrays, and `Rows` of it; packed where the task packs.

An entry is named after the source's bytes, the tokeniser's bytes and the settings that decide a
token or a label.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fedpet.config import DataConfig
from fedpet.data.cache import Entry, cached, unwritable
from fedpet.data.collator import COLLATORS
from fedpet.data.dense_inputs import dense_of
from fedpet.data.images import path_of
from fedpet.data.rows import Rows
from fedpet.data.split_rows import Split
from fedpet.data.tokenize import hash_tokenizer_files
from fedpet.errors import DataError
from fedpet.tasks import Encoding, RawRows, Task, kind_of, portable_name
from fedpet.tasks.class_labels import check_label_names

__all__ = ["OnRows", "ReadRows", "pack", "rows_entry", "rows_key", "rows_of", "task_of"]

OnRows = Callable[[int, int], None]  # rows done, rows in all
ReadRows = Callable[[], RawRows]


def task_of(split: Split, data: DataConfig, cache: Path) -> Task:
    """Return the task, with the classes that are configured or that the rows name."""
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
        names = kind_of(data.task).class_names(labels, train.where, known)
        return Entry({}, {"label_names": names})

    key = {**train.source.identity(train.name), "label_column": data.label_column}
    if kind_of(data.task).has_label_lists:
        key["lists"] = True
    return tuple(cached(cache, "labels", key, compute).meta["label_names"])


def _versions() -> list[str]:
    """Return the libraries' versions: a newer one may cut a text into other tokens."""
    return [importlib.metadata.version(name) for name in ("tokenizers", "transformers")]


def rows_key(split: Split, data: DataConfig, task: Task) -> dict[str, Any]:
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


def _named_files(split: Split, data: DataConfig, cache: Path) -> dict[str, Any]:
    """Return a hash of path, size and time of the files that rows name; {} where they name none."""

    def compute() -> Entry:
        column = split.read().column(data.text_columns[0], "data.text-columns", split.where)
        if path_of(column[0], None) is None:
            return Entry({}, {"paths": []})
        return Entry({}, {"paths": [str(path_of(value, None) or "") for value in column]})

    key = {**split.source.identity(split.name), "column": data.text_columns[0]}
    paths = cached(cache, "paths", key, compute).meta["paths"]
    digest = hashlib.sha256()
    for name in paths:
        path = (split.folder or Path()) / name
        if path.is_file():
            found = path.stat()
            digest.update(f"{path}\0{found.st_size}\0{found.st_mtime_ns}\0".encode())
    return {"named_files": digest.hexdigest()} if paths else {}


def rows_entry(
    split: Split,
    data: DataConfig,
    task: Task,
    tokenizer_folder: Path,
    cache: Path,
    on_rows: OnRows,
    read: ReadRows | None = None,
    taking: np.ndarray | None = None,
) -> Entry:
    """Return the examples of a split, made where the cache has none.

    Args:
        split: The rows.
        data: The settings.
        task: Its classes.
        tokenizer_folder: The backbone's local folder.
        cache: Root of the cache.
        on_rows: Is called while rows are tokenised.
        read: Reads and checks all rows of the split; None has the task do it.
        taking: The numbers of the rows that take part, ascending; None takes those of the split.
    """
    key = {
        "tokenizer": hash_tokenizer_files(tokenizer_folder),
        "by": _versions(),
        **rows_key(split, data, task),
        **(_named_files(split, data, cache) if kind_of(task).reads_files else {}),
        "max_length": data.max_length,
    }
    if taking is not None:
        key["taking"] = hashlib.sha256(taking.astype(np.int64).tobytes()).hexdigest()

    def compute() -> Entry:
        kind, where = kind_of(task), split.where
        raw = read() if read else kind.read(split, data, task)
        numbers = split.choose(data, split.max_rows) if taking is None else taking
        if not len(numbers):
            raise DataError(
                f"no row of the {len(raw.labels)} in {where} is {split.part} at data.eval-fraction "
                f"{data.eval_fraction}: change the fraction, or add rows."
            )
        try:
            cache.mkdir(parents=True, exist_ok=True)
            how = Encoding(
                numbers, data, tokenizer_folder, where, spools=cache,
                on_rows=lambda done: on_rows(done, len(numbers)),
            )  # fmt: skip
            arrays, padding = kind.encode(raw, how)
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


def rows_of(entry: Entry, data: DataConfig) -> Rows:
    """Return the examples of an entry, before any packing."""
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
        tags=entry.arrays.get("tags"),
        choices=entry.arrays.get("choices"),
        dense=dense_of(entry.arrays),
    )


def pack(
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
    return rows_of(packed, data), np.split(np.arange(ends[-1] if len(ends) else 0), ends[:-1])
