"""The task: what a label is, and the one number by which a model is judged.

In:  labels as a source gives them.
Out: a `Task`, and the labels as class indices or as float32 values.

A label's rule: a string is looked up in the label names; a whole number is a class index,
0 ... n-1; a regression label is a finite number. Anything else is refused with its row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedpet.config import DataConfig
from fedpet.errors import ConfigError, DataError


@dataclass(frozen=True)
class Task:
    """What the model is to predict."""

    kind: str  # "classification" or "regression"
    label_names: tuple[str, ...]  # by class index; () for regression
    metric: str  # accuracy, f1, matthews, pearson

    @property
    def num_outputs(self) -> int:
        """Outputs of the model's head: one a class, or one value."""
        return len(self.label_names) or 1


def check_label_names(data: DataConfig) -> None:
    """Refuse configured label names that no task can have.

    Raises:
        ConfigError: Names for a regression, one name alone, or a name twice.
    """
    names = list(data.label_names)
    if data.task == "regression" and names:
        raise ConfigError(
            f"data.label-names {names} belong to a classification: leave them out for a "
            "regression, or set data.task = 'classification'."
        )
    if len(names) == 1 or len(set(names)) < len(names):
        raise ConfigError(f"data.label-names must be two or more different names, got {names}.")


def read_off_label_names(labels: Sequence[Any], where: str) -> tuple[str, ...]:
    """The names of the classes, by index, where neither the user nor the source tells them.

    Args:
        labels: All labels of the training split: the strings sorted, or 0 up to the largest.
        where: The split, for messages.

    Raises:
        DataError: Fewer than two classes, or more than there are rows.
    """
    names = _read_off(labels, where)
    if len(names) < 2:
        raise DataError(
            f"the labels of {where} name one class only, {list(names)}: a classification needs "
            "two. Name all classes with data.label-names, or check data.label-column."
        )
    return names


def _read_off(labels: Sequence[Any], where: str) -> tuple[str, ...]:
    strings = {label for label in labels if isinstance(label, str)}
    if strings:
        return tuple(sorted(strings))
    indices = []
    for row, label in enumerate(labels):
        index = _whole_number(label)
        if index is None:
            raise DataError(
                f"row {row + 1} of {where} has the label {label!r}. A class is a string or a "
                "whole number from 0: mend or remove the row, or set data.task = 'regression' "
                "if labels are measurements."
            )
        indices.append(index)
    num_classes = max(indices, default=0) + 1
    if num_classes > max(2, len(labels)):
        raise DataError(
            f"label {num_classes - 1} of {where} is the index of class {num_classes}, and there "
            f"are {len(labels)} rows. Whole numbers are class indices 0 ... n-1: check "
            "data.label-column, or set data.task = 'regression'."
        )
    return tuple(str(index) for index in range(num_classes))


def encode_labels(
    labels: Sequence[Any], kind: str, label_names: tuple[str, ...], where: str
) -> np.ndarray:
    """Turn labels into class indices, int64 (n,), or regression values, float32 (n,).

    Raises:
        DataError: A label that breaks the rule above, named with its row and the known labels.
    """
    if kind == "regression":
        return np.asarray(
            [_value(label, row, where) for row, label in enumerate(labels)], dtype=np.float32
        )
    index_of = {name: index for index, name in enumerate(label_names)}
    return np.asarray(
        [_index(label, index_of, row, where) for row, label in enumerate(labels)], dtype=np.int64
    )


def _value(label: Any, row: int, where: str) -> float:
    if isinstance(label, int | float) and not isinstance(label, bool) and math.isfinite(label):
        return float(label)
    raise DataError(
        f"row {row + 1} of {where} has the label {label!r}. A regression label is a finite "
        "number: mend or remove the row, or set data.task = 'classification'."
    )


def _index(label: Any, index_of: dict[str, int], row: int, where: str) -> int:
    if isinstance(label, str):
        index = index_of.get(label)
    else:
        index = _whole_number(label)
        if index is not None and index >= len(index_of):
            index = None
    if index is not None:
        return index
    raise DataError(
        f"row {row + 1} of {where} has the label {label!r}. Known are "
        f"{_listed(list(index_of))}, or their indices 0 ... {len(index_of) - 1}: mend or remove "
        "the row, or name all classes with data.label-names."
    )


def _whole_number(label: Any) -> int | None:
    """The class index a label stands for; 1.0 and True are 1, and -1 is none."""
    if isinstance(label, int | float) and label >= 0 and label % 1 == 0:
        return int(label)
    return None


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:10])
    return shown if len(names) <= 10 else f"{shown} and {len(names) - 10} more"
