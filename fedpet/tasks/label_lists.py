"""Read labels that are lists: the classes of a row, or a class for each of its words.

A list may also come as its JSON text, as in a .csv. What stands in it is a class as
fedpet/tasks/class_labels.py has it: a name, or an index.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np

from fedpet.errors import DataError
from fedpet.tasks.class_labels import encode_labels

__all__ = ["encode_lists", "read_lists"]


def read_lists(values: Sequence[Any], where: str) -> Iterator[list[Any]]:
    """Yield the list of each row.

    Raises:
        DataError: A row has none.
    """
    for number, value in enumerate(values):
        found = value
        if isinstance(value, str):
            try:
                found = json.loads(value)
            except ValueError:
                found = None
        if not isinstance(found, list | tuple):
            raise DataError(
                f"row {number + 1} of {where} has {value!r:.60}, where a list should be, such as "
                '["a", "b"]: mend or remove the row, or check the column.'
            )
        yield list(found)


def encode_lists(
    lists: Sequence[Sequence[Any]], label_names: tuple[str, ...], where: str
) -> tuple[np.ndarray, np.ndarray]:
    """Turn lists of labels into class indices, int64 (labels,), and lengths, int64 (rows,).

    Raises:
        DataError: A label that is no class.
    """
    lengths = np.array([len(one) for one in lists], dtype=np.int64)
    where = f"the labels, one after the other, of {where}"
    flat = list(chain(*lists))
    if not flat:
        return np.empty(0, dtype=np.int64), lengths
    return encode_labels(flat, "classification", label_names, where), lengths
