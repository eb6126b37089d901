"""Name some rows of a source, and read their columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedpet.config import DataConfig
from fedpet.data.column import Column
from fedpet.data.local_files import Files
from fedpet.data.row_hash import choose_rows
from fedpet.data.source import Source
from fedpet.data.split_table import Table
from fedpet.data.tokenize import check_texts
from fedpet.errors import DataError
from fedpet.tasks import kind_of

__all__ = ["Split", "train_and_held_out"]


@dataclass(frozen=True)
class Split:
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

    @property
    def folder(self) -> Path | None:
        """Return the folder of the split's first file; None where it has no file."""
        return self.source.folder(self.name)

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

    def check_texts(self, texts: Sequence[Column], columns: Sequence[str]) -> None:
        """Refuse the first entry that is no text, or no Unicode: half a surrogate pair.

        Raises:
            DataError: With the row and the column.
        """
        for name, column in zip(columns, texts, strict=True):
            check_texts(column, name, self.where)
            for row, text in enumerate(column) if not column.is_text else ():
                try:
                    text.encode()
                except UnicodeEncodeError:
                    raise DataError(
                        f"row {row + 1} of {self.where} has a text in column {name!r} that is no "
                        f"Unicode, {text[:40]!a}: mend or remove the row."
                    ) from None

    def labels(self, column: str) -> Column:
        """Read all labels; a class index of the source's numbering as the name it stands for."""
        return self.read().labels(column, "data.label-column", self.where)

    def choose(self, data: DataConfig, max_rows: int) -> np.ndarray:
        """Return the numbers of its rows, int64 (k,), ascending; their texts are checked."""
        table, hashes = self.read(), None
        if self.part != "all" or 0 < max_rows < table.num_rows:
            hashes = table.hashes(kind_of(data.task).columns(data), self.where)
        return choose_rows(table.num_rows, hashes, self.part, data.eval_fraction, max_rows)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def train_and_held_out(source: Source, data: DataConfig) -> tuple[Split, Split]:
    """Return the rows to train on, and those to evaluate on."""
    if data.eval_on == "clients":
        every = Split(source, data.train_split, "all", data.max_train_rows)
        return every, every
    if not data.eval_split or (isinstance(source, Files) and "" in source.files):
        return (
            Split(source, data.train_split, "kept", data.max_train_rows),
            Split(source, data.train_split, "held out", data.max_eval_rows),
        )
    return (
        Split(source, data.train_split, "all", data.max_train_rows),
        Split(source, data.eval_split, "all", data.max_eval_rows),
    )
