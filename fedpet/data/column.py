"""Hold the values of a column compactly: in Arrow arrays where they are of one plain type.

In:  values as a file's format gives them.
Out: a `Column`, a sequence of Python values that makes each of them when it is asked for; its
     distinct values, and which of them each row has.

A text costs its bytes and a few more there, and as a Python object 50 more. Values of several types
stay Python objects: 1 and 1.0 are two values, and a column that mixes them keeps both. So do all
where pyarrow is not installed, as on a node; the values are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np

from fedpet.utils.extras import has_arrow

__all__ = ["Column", "ColumnBuilder", "Selection", "distinct_values", "pack_rows"]

BATCH_ROWS = 4096  # that are Python objects at a time
_PLAIN = (str, int, float, bool)


class Column(Sequence[Any]):
    """The values of a column, in the order of the rows.

    Args:
        values: A list, or a `pyarrow.ChunkedArray`.

    Attributes:
        arrow: The values as a `pyarrow.ChunkedArray` of texts, numbers or truth values; None where
            they are anything else.
    """

    def __init__(self, values: Any) -> None:
        self.arrow: Any = None
        self._values: list[Any] = []
        if isinstance(values, list):
            self._values = values
        elif _is_plain(values.type):
            self.arrow = values
        else:
            self._values = values.to_pylist()

    @classmethod
    def joined(cls, columns: Sequence[Column]) -> Column:
        """Join the columns of several files."""
        if len(columns) == 1:
            return columns[0]
        import pyarrow as pa

        arrays = [column.arrow for column in columns if column.arrow is not None]
        if len(arrays) == len(columns) and len({array.type for array in arrays}) == 1:
            chunks = [chunk for array in arrays for chunk in array.chunks]
            return cls(pa.chunked_array(chunks, arrays[0].type))
        return cls(list(chain(*columns)))

    @property
    def is_text(self) -> bool:
        """True where it is in Arrow arrays of texts."""
        return self.arrow is not None and str(self.arrow.type) in ("string", "large_string")

    def __len__(self) -> int:
        return len(self._values) if self.arrow is None else len(self.arrow)

    def __getitem__(self, index: Any) -> Any:
        if self.arrow is None:
            return self._values[index]
        if isinstance(index, slice):
            start, stop, _ = index.indices(len(self))
            return self.arrow.slice(start, max(stop - start, 0)).to_pylist()
        return self.arrow[index].as_py()

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self), BATCH_ROWS):
            yield from self[start : start + BATCH_ROWS]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def take(self, numbers: np.ndarray) -> Any:
        """Return some rows, their numbers ascending: an Arrow array, or a list."""
        if self.arrow is None:
            return [self._values[i] for i in numbers]
        import pyarrow as pa

        ends = np.cumsum([len(chunk) for chunk in self.arrow.chunks])
        first, last = (
            np.searchsorted(ends, numbers[[0, -1]], side="right") if len(numbers) else (0, -1)
        )
        parts = [pa.array([], self.arrow.type)]
        cuts = np.searchsorted(numbers, ends[first : last + 1]).tolist()
        for index, start, stop in zip(range(first, last + 1), [0, *cuts], cuts, strict=False):
            chunk = self.arrow.chunk(index)
            parts.append(chunk.take(numbers[start:stop] - (ends[index] - len(chunk))))
        return pa.concat_arrays(parts)

    def distinct(self) -> tuple[list[Any], np.ndarray]:
        """Return the distinct values and, for each row, the index of its own: int32 (n,)."""
        if self.arrow is None:
            return distinct_values(self._values)
        encoded = self.arrow.dictionary_encode(null_encoding="encode")
        codes = [chunk.indices.to_numpy() for chunk in encoded.chunks]
        values = encoded.chunks[0].dictionary.to_pylist() if codes else []
        return values, np.concatenate([np.empty(0, np.int32), *codes])


class Selection(Sequence[Any]):
    """Some rows of a column, their numbers ascending; a slice is an Arrow array, or a list."""

    def __init__(self, column: Column, numbers: np.ndarray) -> None:
        self._column, self._numbers = column, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self._column.take(self._numbers[index])
        return self._column[int(self._numbers[index])]


def distinct_values(values: Sequence[Any]) -> tuple[list[Any], np.ndarray]:
    """Return the distinct values, types told apart, and the index of each row's: int32 (n,)."""
    if isinstance(values, Column) and values.arrow is not None:
        return values.distinct()
    found: list[Any] = []
    index_of: dict[Any, int] = {}
    codes = np.empty(len(values), dtype=np.int32)
    for row, value in enumerate(values):
        try:
            code = index_of.setdefault((type(value), value), len(found))
        except TypeError:  # a list, a dictionary: each for itself
            code = len(found)
        if code == len(found):
            found.append(value)
        codes[row] = code
    return found, codes


class ColumnBuilder:
    """Make the columns of rows that come as dictionaries, a batch after the other."""

    def __init__(self) -> None:
        self._pieces: dict[str, list[Any]] = {}
        self._batch: list[dict[str, Any]] = []
        self.num_rows = 0

    def add(self, row: dict[str, Any]) -> None:
        """Add a row; what it lacks of others' columns is None."""
        self._batch.append(row)
        self.num_rows += 1
        if len(self._batch) == BATCH_ROWS:
            self._pack()

    def columns(self) -> dict[str, Column]:
        """Return the columns in the order in which the rows named them."""
        self._pack()
        return {name: Column(_join(pieces)) for name, pieces in self._pieces.items()}

    def _pack(self) -> None:
        rows, self._batch = self._batch, []
        for row in rows:
            for name in row:
                if name not in self._pieces:
                    before = self.num_rows - len(rows)
                    self._pieces[name] = [_packed([None] * before)] if before else []
        if rows:
            for name, pieces in self._pieces.items():
                pieces.append(_packed([row.get(name) for row in rows]))


def pack_rows(rows: Iterable[Sequence[Any]], width: int) -> list[Column]:
    """Make the columns of rows of equal width, a batch after the other."""
    pieces: list[list[Any]] = [[] for _ in range(width)]
    rest = iter(rows)
    while batch := list(islice(rest, BATCH_ROWS)):
        for column, values in zip(pieces, zip(*batch, strict=True), strict=True):
            column.append(_packed(list(values)))
    return [Column(_join(column)) for column in pieces]


def _packed(values: list[Any]) -> Any:
    """Return values of one plain type as an Arrow array; others as they are."""
    if not has_arrow():
        return values
    import pyarrow as pa

    kinds = set(map(type, values)) - {type(None)}
    if not kinds:
        return pa.nulls(len(values))
    [kind, *others] = kinds
    if others or kind not in _PLAIN:
        return values
    to: dict[type, Callable[[], Any]] = {str: pa.string, int: pa.int64, float: pa.float64}
    try:
        # Arrow's own pool takes half as much again for many small arrays.
        pool = pa.system_memory_pool()
        return pa.array(values, to.get(kind, pa.bool_)(), memory_pool=pool)
    except (pa.ArrowInvalid, OverflowError, UnicodeEncodeError):  # half a surrogate pair, 2**64
        return values


def _join(pieces: list[Any]) -> Any:
    """Return pieces as one chunked array where all are of one type, else as one list."""
    if all(isinstance(piece, list) for piece in pieces):
        return list(chain(*pieces))
    import pyarrow as pa

    kinds = {None if isinstance(piece, list) else piece.type for piece in pieces}
    kinds.discard(pa.null())
    if len(kinds) == 1 and None not in kinds:
        [kind] = kinds
        return pa.chunked_array([piece.cast(kind) for piece in pieces], kind)
    lists = (piece if isinstance(piece, list) else piece.to_pylist() for piece in pieces)
    return list(chain(*lists))


def _is_plain(kind: Any) -> bool:
    import pyarrow as pa

    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or any(t(kind) for t in tests)
