"""Read labels as a task's classes or numbers.

In:  labels as a source gives them.
Out: the names of the classes; labels as class indices, or as float32 values.

A class has a name, and a label means the class of its name, whatever its type: `name_of_label`
makes 1, 1.0, "1" and "1.0" one, and so true, "True" and "true". A label that is no name stands for
the same value otherwise written (True for 1, 0 for False); then, where no name is a number or a
truth value, for a class index, 0 ... n-1. Anything else is refused with its row. A regression label
is a finite number, or its text.

Names that nobody tells are read off the training rows. Whole numbers with a 0 among them are the
indices 0 ... n-1, those without a row included; whole numbers without a 0 are the names that are
there, by size; other labels are names in alphabetical order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpet.errors import ConfigError, DataError
from fedpet.tasks.task_kind import kind_of

if TYPE_CHECKING:
    from fedpet.config import DataConfig

__all__ = ["check_label_names", "encode_labels", "name_of_label", "read_off_label_names"]


def name_of_label(label: Any) -> str | None:
    """Return the name of a label's class, the same for all ways to write a value.

    None for what is no label: a missing value, a list, a date.

    Example:
        >>> [name_of_label(label) for label in (1, 1.0, " 1.0", True, "TRUE", "01", "neg ")]
        ['1', '1', '1', 'True', 'True', '01', 'neg ']
    """
    if not isinstance(label, str | int | float | Decimal) or label != label:
        return None
    text = str(label)
    bare = text.strip()
    if bare.lower() in ("true", "false"):
        return bare.capitalize()
    if whole := _WHOLE.fullmatch(bare):
        return "0" if whole[1] == "-0" else whole[1]
    return text


_WHOLE = re.compile(r"(-?(?:0|[1-9][0-9]*))(?:\.0*)?")
# Numbers that are no names unless somebody says so: measurements, and -1 for an absent label.
_BROKEN = re.compile(r"\s*(-[0-9]+|[+-]?[0-9]*\.[0-9]+([eE][+-]?[0-9]+)?|-?inf)\s*")
_SAME_VALUE = {"True": "1", "False": "0", "1": "True", "0": "False"}


def check_label_names(data: DataConfig) -> None:
    """Refuse configured label names that no task can have.

    Raises:
        ConfigError: Names for a regression, one name alone, or a name twice.
    """
    names = list(data.label_names)
    if names and not kind_of(data.task).has_classes:
        raise ConfigError(
            f"data.label-names {names} belong to a classification: leave them out, "
            f"since data.task is {data.task!r}, or set data.task = 'classification'."
        )
    if len(names) == 1 or len({name_of_label(name) for name in names}) < len(names):
        raise ConfigError(f"data.label-names must be two or more different names, got {names}.")


def read_off_label_names(
    labels: Sequence[Any], where: str, known: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """Read the names of the classes off the labels, where the user does not name them.

    Args:
        labels: All labels of the training split.
        where: The split, for messages.
        known: The names that the source tells, which then are the classes.

    Raises:
        DataError: Fewer than two classes, or more than there are rows.
    """
    names = known or _read_off(labels, where)
    if len(set(map(name_of_label, names))) < max(2, len(names)):
        raise DataError(
            f"the labels of {where} name one class only, {list(names)}: a classification needs "
            "two. Name all classes with data.label-names, or check data.label-column."
            if len(names) < 2
            else f"the classes of {where} are {list(names)}, and two of these names are one value "
            "written in two ways: name all classes with data.label-names."
        )
    return names


def _read_off(labels: Sequence[Any], where: str) -> tuple[str, ...]:
    from fedpet.data.column import distinct_values  # a later stage

    values, codes = distinct_values(labels)
    names = [name_of_label(value) for value in values]
    found = {name for name in names if name is not None and not _BROKEN.fullmatch(name)}
    if len(found) > 1 and not all(map(_WHOLE.fullmatch, found)):
        return tuple(sorted(found))  # other labels have no class, and `encode_labels` refuses them
    broken = np.array([name not in found for name in names], dtype=bool)[codes]
    if broken.any():
        row = int(broken.argmax())
        raise DataError(
            f"row {row + 1} of {where} has the label {labels[row]!r}. A class is a string or a "
            "whole number from 0: mend or remove the row, name all classes with "
            "data.label-names, or set data.task = 'regression' if labels are measurements."
        )
    if not all(map(_WHOLE.fullmatch, found)):
        return tuple(found)
    numbers = sorted(map(int, found))
    if not numbers or numbers[0] > 0:
        return tuple(map(str, numbers))
    num_classes = numbers[-1] + 1
    if num_classes > max(2, len(labels)):
        raise DataError(
            f"label {num_classes - 1} of {where} is the index of class {num_classes}, and there "
            f"are {len(labels)} rows. Whole numbers are class indices 0 ... n-1: check "
            "data.label-column, name all classes with data.label-names, or set data.task = "
            "'regression'."
        )
    return tuple(map(str, range(num_classes)))


def encode_labels(
    labels: Sequence[Any], kind: str, label_names: tuple[str, ...], where: str
) -> np.ndarray:
    """Turn labels into class indices, int64 (n,), or regression values, float32 (n,).

    Raises:
        DataError: A label that breaks the rule above, named with its row and the known labels.
    """
    from fedpet.data.column import distinct_values  # a later stage

    values, codes = distinct_values(labels)
    if kind == "regression":
        numbers = np.asarray([_value(value) for value in values], dtype=np.float64)
        if (broken := ~np.isfinite(numbers)[codes]).any():
            row = int(broken.argmax())
            raise DataError(
                f"row {row + 1} of {where} has the label {labels[row]!r}. A regression label is a "
                "finite number: mend or remove the row, or set data.task = 'classification'."
            )
        values32: np.ndarray = numbers.astype(np.float32)[codes]
        return values32
    index_of = _index_of_names(label_names)
    indices: np.ndarray = np.array([_index(value, index_of) for value in values], dtype=np.int64)[
        codes
    ]
    if (indices < 0).any():
        row = int((indices < 0).argmax())
        known = _listed(list(label_names))
        if len(index_of) > len(label_names):
            known += f", or their indices 0 ... {len(label_names) - 1}"
        raise DataError(
            f"row {row + 1} of {where} has the label {labels[row]!r}. Known are {known}: mend or "
            "remove the row, or name all classes with data.label-names."
        )
    return indices


def _index(label: Any, index_of: dict[str | None, int]) -> int:
    """Return the index of a label's class; -1 for none."""
    name = name_of_label(label)
    return -1 if name is None else index_of.get(name, index_of.get(_SAME_VALUE.get(name, ""), -1))


def _index_of_names(label_names: tuple[str, ...]) -> dict[str | None, int]:
    """Class indices by name; and by their own number, where that is no name of another class."""
    index_of = {name_of_label(name): index for index, name in enumerate(label_names)}
    if not any(name in _SAME_VALUE or _WHOLE.fullmatch(name or "") for name in index_of):
        index_of |= {str(index): index for index in range(len(label_names))}
    return index_of


def _value(label: Any) -> float:
    """Return a number or its text as a number; NaN for what is none."""
    if isinstance(label, str | int | float | Decimal) and not isinstance(label, bool):
        try:
            return float(label)
        except (ValueError, OverflowError):
            pass
    return math.nan


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:10])
    return shown if len(names) <= 10 else f"{shown} and {len(names) - 10} more"
