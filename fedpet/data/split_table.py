"""Read the rows of a split by column, whatever files they came from.

In:  `Piece`s: the rows of one file each.
Out: a `Table`: a column is read when it is asked for, and a column that nobody asks for never is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedpet.data.column import Column, distinct_values
from fedpet.data.row_hash import hash_rows
from fedpet.errors import DataError


@dataclass(frozen=True)
class Piece:
    """The rows of one file."""

    column_names: tuple[str, ...]
    num_rows: int
    read: Callable[[str], Column]  # a column, by its name
    label_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # where it tells them
    typed: bool = True  # False where the format tells no number from a text

    @classmethod
    def of_columns(
        cls,
        columns: Mapping[str, Column],
        label_names: Mapping[str, tuple[str, ...]] | None = None,
        *,
        typed: bool = True,
    ) -> Piece:
        """Make the rows of columns of equal length."""
        num_rows = len(next(iter(columns.values()), []))
        return cls(tuple(columns), num_rows, columns.__getitem__, label_names or {}, typed)


class Table:
    """The rows of one split.

    Args:
        pieces: In the order of their rows.
        left_out: Rows of the source that are none of the table's, by the reason.
    """

    def __init__(self, pieces: Sequence[Piece], left_out: Mapping[str, int] | None = None) -> None:
        self._pieces = pieces
        self._hashes: dict[tuple[str, ...], np.ndarray] = {}
        self.left_out = dict(left_out or {})

    @property
    def num_rows(self) -> int:
        return sum(piece.num_rows for piece in self._pieces)

    @property
    def typed(self) -> bool:
        """True where the format tells a number from a text."""
        return all(piece.typed for piece in self._pieces)

    @property
    def column_names(self) -> tuple[str, ...]:
        """Return the columns that all pieces have."""
        first, *others = [piece.column_names for piece in self._pieces]
        return tuple(name for name in first if all(name in names for names in others))

    def label_names(self, column: str) -> tuple[str, ...]:
        """Return the source's names of a column's classes, by index; () where it has none."""
        names = (name for piece in self._pieces for name in piece.label_names.get(column, ()))
        return tuple(dict.fromkeys(names))

    def column(self, name: str, key: str, where: str) -> Column:
        """Read all values of a column.

        Args:
            name: The column.
            key: The setting that names it, for the message.
            where: The split, for the message.

        Raises:
            DataError: There is no row, or no such column; those there are get named.
        """
        self._check(name, key, where)
        return Column.joined([piece.read(name) for piece in self._pieces])

    def labels(self, name: str, key: str, where: str) -> Column:
        """Read all values of a column, a class index of a piece's numbering as the name it means.

        Raises:
            DataError: As `column`.
        """
        self._check(name, key, where)
        labels = []
        for piece in self._pieces:
            values = piece.read(name)
            if known := dict(enumerate(piece.label_names.get(name, ()))):
                found, codes = distinct_values(values)
                found = [_named(known, value) for value in found]
                values = Column([found[code] for code in codes.tolist()])
            labels.append(values)
        return Column.joined(labels)

    def hashes(self, names: Sequence[str], where: str) -> np.ndarray:
        """Return a number in [0, 1) for each row, by its texts: float64 (n,). See `hash_rows`."""
        key = tuple(names)
        if key not in self._hashes:
            columns = [self.column(name, "data.text-columns", where) for name in names]
            self._hashes[key] = hash_rows(columns)
        return self._hashes[key]

    def dataset(self) -> Any:
        """Return the whole split as a `datasets.Dataset`."""
        import pyarrow as pa
        from datasets import Dataset

        columns = {}
        for name in self.column_names:
            values = self.column(name, name, "the split")
            if values.arrow is not None:
                columns[name] = values.arrow
                continue
            try:
                columns[name] = pa.array(list(values))
            except (pa.ArrowInvalid, pa.ArrowTypeError):  # of more types than one
                columns[name] = pa.array([None if v is None else str(v) for v in values])
        return Dataset(pa.table(columns))

    def _check(self, name: str, key: str, where: str) -> None:
        if not self.num_rows:
            raise DataError(f"{where} has no rows.")
        if name not in self.column_names:
            known = ", ".join(repr(one) for one in self.column_names) or "none"
            raise DataError(f"{where} has no column {name!r}. It has {known}: set {key}.")


def _named(known: Mapping[int, str], value: Any) -> Any:
    if isinstance(value, list):
        return [_named(known, one) for one in value]
    try:
        return known.get(value, value)
    except TypeError:  # a dictionary, which is no index
        return value
