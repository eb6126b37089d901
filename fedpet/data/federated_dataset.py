"""Describe labelled rows of clients: from memory, a file, a folder or the hub.

In:  a `datasets.Dataset` or `DatasetDict`, a pandas DataFrame, a list of rows, or a source's name;
     the columns, and what tells the clients apart.
Out: a `FederatedDataset` for `fedpet.simulate`. Rows in memory are written to the cache once, as
     Arrow files under the hash of their content, where every process and a resumed run find them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpet.config import DataConfig
from fedpet.config.parsing import read_stage
from fedpet.data.content_folder import store_folder
from fedpet.data.local_files import Files
from fedpet.data.open_source import open_source
from fedpet.data.partition import partition_with
from fedpet.data.row_hash import hold_out
from fedpet.data.tokenize import check_texts
from fedpet.errors import ConfigError, DataError
from fedpet.tasks import kind_of
from fedpet.tasks.text_rows import LabelledTexts

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["FederatedDataset", "load_federated_dataset"]

CLIENT_COLUMN = "fedpet_client"
RULES = ("dirichlet", "shards", "iid")  # partitioners by name
_EVALUATION_SPLITS = ("test", "validation", "valid", "dev", "eval")


@dataclass(frozen=True, kw_only=True)
class FederatedDataset:
    """Rows with labels and clients; `load_federated_dataset` makes one.

    Attributes:
        data: Keys of the experiment's table [data] that differ from their defaults.
        clients: The same of [clients].
        splits: Rows in memory, by split; empty where `data["source"]` names them.
        tokenizer: Reads the texts; None takes the model's own.
    """

    data: Mapping[str, Any]
    clients: Mapping[str, Any]
    splits: Mapping[str, Dataset] = field(default_factory=dict)
    tokenizer: Any = None

    def tables(self, cache: Path) -> dict[str, dict[str, Any]]:
        """Return the experiment's tables [data] and [clients]; rows in memory are written.

        Args:
            cache: Root of the cache.

        Raises:
            DataError: The cache cannot be written.
        """
        data = dict(self.data)
        if self.splits:
            data["source"] = str(store_folder(cache / "datasets", self._write).absolute())
        return {"data": data, "clients": dict(self.clients)}

    def _write(self, folder: Path) -> None:
        import pyarrow as pa

        for name, rows in self.splits.items():
            table = rows.with_format("arrow")[:].combine_chunks()
            schema = table.schema.with_metadata(rows.features.arrow_schema.metadata)
            with pa.ipc.new_stream(str(folder / f"{name}.arrow"), schema) as writer:
                writer.write_table(table.cast(schema))


def load_federated_dataset(
    dataset: Any,
    *,
    client_column: str = "",
    label_column: str = "label",
    text_columns: str | list[str] = "text",
    tokenizer: Any = None,
    partitioner: Any = None,
    evaluation: Any = None,
    **settings: Any,
) -> FederatedDataset:
    """Describe rows for a federation.

    Args:
        dataset: A `datasets.Dataset` or `DatasetDict`, a dict of datasets by split, a pandas
            DataFrame, or a list of dicts; or a source's name as `data.source` takes it: a file, a
            folder, a hub name, "bundled".
        client_column: Tells the clients apart.
        label_column: Holds class names, class indices, or numbers for a regression; lists of
            classes where a row has several, or a word has one; language models have none.
        text_columns: One column of texts, or two for pairs; of lists of words, images or speech.
        tokenizer: Of the model, or its processor; None takes the one beside its checkpoint.
        partitioner: Makes clients where no column tells them: an object with flwr-datasets'
            interface (`dataset` is assigned, `num_partitions` and `load_partition(i)` are read),
            or the name of a rule of the experiment's [clients] ("dirichlet", "shards", "iid").
            An object deals out the training rows here; rows that it gives to nobody are left out.
        evaluation: The rows to evaluate on: a split's name, a dataset, or the fraction of the
            training rows to hold out by a hash of their text. None takes the split "test" or
            "validation" where there is one, else a fifth of the rows.
        settings: Other keys of the experiment's [data]: task, metric, max_length, label_names,
            messages_column, response_column, separator, max_train_rows, max_eval_rows,
            train_split.

    Raises:
        DataError: Rows or columns that cannot be used.
        ConfigError: An unknown key, or arguments that contradict each other.

    Example:
        >>> rows = [{"text": "a fine film", "label": "fresh", "client": "Ann"},
        ...         {"text": "dull", "label": "rotten", "client": "Bob"}] * 20
        >>> load_federated_dataset(rows, client_column="client", evaluation=0.25).clients
        {'partition': 'column', 'client-column': 'client'}
    """
    texts = [text_columns] if isinstance(text_columns, str) else list(text_columns)
    data = {name.replace("_", "-"): value for name, value in settings.items()}
    data |= {"label-column": label_column, "text-columns": texts}
    if "source" in data or "eval-split" in data or "eval-fraction" in data:
        raise ConfigError(
            "the rows are the first argument of load_federated_dataset, and those to evaluate on "
            "its argument `evaluation`: leave source, eval_split and eval_fraction out."
        )
    clients = _clients(client_column, partitioner)
    by_object = partitioner is not None and not isinstance(partitioner, str)
    splits: dict[str, Dataset] = {}
    if isinstance(dataset, str | Path):
        data["source"] = str(dataset)
        data |= _evaluation_of_source(evaluation)
        if by_object:
            splits = _read_splits(data)
    else:
        splits = _splits(dataset, data, evaluation)
    config = read_stage(DataConfig, "data", _lists(data))
    if by_object:
        splits = _partitioned(splits, partitioner, config, data)
    return FederatedDataset(data=data, clients=clients, splits=splits, tokenizer=tokenizer)


def _clients(client_column: str, partitioner: Any) -> dict[str, Any]:
    if client_column and partitioner is not None:
        raise ConfigError(
            f"clients come from a column or from a partitioner, got client_column "
            f"{client_column!r} and {partitioner!r}: leave one out."
        )
    if client_column:
        return {"partition": "column", "client-column": client_column}
    if isinstance(partitioner, str):
        if partitioner not in RULES:
            raise ConfigError(
                f"a partitioner's name must be one of {', '.join(RULES)}, got {partitioner!r}."
            )
        return {"partition": partitioner}
    if partitioner is None:
        return {}
    if not all(hasattr(partitioner, name) for name in ("load_partition", "num_partitions")):
        raise ConfigError(
            f"a partitioner must have load_partition and num_partitions, as flwr-datasets' have, "
            f"got {partitioner!r}."
        )
    return {"partition": "column", "client-column": CLIENT_COLUMN}


def _evaluation_of_source(evaluation: Any) -> dict[str, Any]:
    """Return the keys of [data] that say what a named source is evaluated on."""
    if evaluation is None:
        return {}
    if isinstance(evaluation, str):
        return {"eval-split": evaluation}
    if isinstance(evaluation, float):
        return {"eval-split": "", "eval-fraction": evaluation}
    raise ConfigError(
        "rows from a named source are evaluated on one of its splits, or on a fraction of its "
        f"rows, got {type(evaluation).__name__}: give the name of a split or a number below 1."
    )


def _splits(dataset: Any, data: dict[str, Any], evaluation: Any) -> dict[str, Dataset]:
    """Bring rows in memory under the names "train" and "test"; `data` is told the rest."""
    given = {name: _as_dataset(rows) for name, rows in _named(dataset).items()}
    wanted = str(data.pop("train-split", "train"))
    train = next(iter(given)) if len(given) == 1 else wanted
    if train not in given:
        raise DataError(
            f"the dataset has no split {wanted!r}. It has {', '.join(map(repr, given))}: name the "
            "one to train on by train_split."
        )
    if evaluation is None:
        others = [name for name in _EVALUATION_SPLITS if name in given and name != train]
        evaluation = others[0] if others else DataConfig.eval_fraction
    splits = {"train": given[train]}
    if isinstance(evaluation, str):
        if evaluation not in given:
            raise DataError(
                f"the dataset has no split {evaluation!r}. It has {', '.join(map(repr, given))}: "
                "name the one to evaluate on by `evaluation`, or the fraction to hold out."
            )
        splits["test"] = given[evaluation]
    elif isinstance(evaluation, int | float) and not isinstance(evaluation, bool):
        data |= {"eval-split": "", "eval-fraction": float(evaluation)}
    else:
        splits["test"] = _as_dataset(evaluation)
    return splits


def _named(dataset: Any) -> dict[str, Any]:
    """Rows by split."""
    if isinstance(dataset, Mapping) and all(
        not isinstance(rows, list | tuple | np.ndarray) for rows in dataset.values()
    ):
        return dict(dataset)
    return {"train": dataset}


def _as_dataset(rows: Any) -> Dataset:
    """Turn a table of rows into a `datasets.Dataset`."""
    from datasets import Dataset

    try:
        if isinstance(rows, list):
            rows = Dataset.from_list(rows)
        elif isinstance(rows, Mapping):
            rows = Dataset.from_dict(dict(rows))
        elif hasattr(rows, "iloc"):  # pandas is not imported for it
            rows = Dataset.from_pandas(rows, preserve_index=False)
    except Exception as error:  # pyarrow raises a dozen kinds
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"the rows do not make a table: {reason}.") from None
    if not isinstance(rows, Dataset):
        raise DataError(
            "rows must be a datasets.Dataset or DatasetDict, a pandas DataFrame, a list of dicts, "
            f"or the name of a file, folder or hub data set, got {type(rows).__name__}."
        )
    if not len(rows):
        raise DataError("a split of the dataset has no rows.")
    return rows


def _read_splits(data: dict[str, Any]) -> dict[str, Dataset]:
    """Read a named source into memory: a partitioner object deals out rows, not names."""
    config = read_stage(DataConfig, "data", _lists(data))
    source = open_source(data.pop("source"))
    names = {"train": data.pop("train-split", config.train_split)}
    if config.eval_split and not (isinstance(source, Files) and "" in source.files):
        names["test"] = data.pop("eval-split", config.eval_split)
    splits = {}
    for split, name in names.items():
        table = source.read(name)
        rows = table.dataset()
        where = f"split {name!r} of {source.description}"
        if kind_of(config.task).has_labels:
            labels = table.labels(config.label_column, "data.label-column", where)
            if known := table.label_names(config.label_column):
                data.setdefault("label-names", list(known))
            rows = rows.remove_columns(config.label_column)
            rows = rows.add_column(config.label_column, list(labels))
        splits[split] = rows
    return splits


def _partitioned(
    splits: Mapping[str, Dataset], partitioner: Any, config: DataConfig, data: dict[str, Any]
) -> dict[str, Dataset]:
    """Deal out the training rows, and write each row's client into a column."""
    train = splits["train"]
    if "test" in splits:
        test = splits["test"]
    else:
        texts = []
        kind = kind_of(config.task)
        for name in kind.columns(config):
            if name not in train.column_names:
                raise DataError(
                    f"the dataset has no column {name!r}. It has "
                    f"{', '.join(map(repr, train.column_names))}: set text_columns."
                )
            texts.append(list(train[name]))
            if isinstance(kind, LabelledTexts):
                check_texts(texts[-1], name, "the dataset")
        kept, held_out = hold_out(texts, config.eval_fraction)
        train, test = train.select(kept), train.select(held_out)
        for key in ("eval-split", "eval-fraction"):
            data.pop(key, None)
    parts = partition_with(partitioner, train)
    owners = np.full(len(train), "", dtype=object)
    for name, rows in parts.items():
        owners[rows] = name
    owned = np.flatnonzero(owners != "")
    train = train.select(owned).add_column(CLIENT_COLUMN, owners[owned].tolist())
    return {"train": train, "test": test}


def _lists(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(v) if isinstance(v, tuple) else v for key, v in table.items()}
