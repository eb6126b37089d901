"""Count the rows of each class, and describe the classes at the start of a run.

In:  a `FederatedData`.
Out: counts by class, and sentences: the classes, and what about them is likely a slip.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from fedpet.data.dataset import FederatedData
from fedpet.data.rows import Rows

_MOST_SHOWN = 10


@dataclass(frozen=True)
class ClassCount:
    """A class, by index; a client that takes no part has no rows here."""

    name: str
    train_rows: int | None  # None where the rows are on nodes, and not known here
    evaluation_rows: int
    clients: int | None  # with a row of it


def count_classes(data: FederatedData) -> tuple[ClassCount, ...]:
    """Count the rows of each class; () for a task without classes.

    A row of several classes counts for each. Where tokens have classes, words are counted.
    """
    names = data.task.label_names
    if not names:
        return ()
    held = np.bincount(_labels_of(data.evaluation)[1], minlength=len(names)).tolist()
    if not len(data.train):
        return tuple(
            ClassCount(n, None, of_one, None) for n, of_one in zip(names, held, strict=True)
        )
    owner_of = np.full(len(data.train), -1)
    for owner, client in enumerate(data.clients):
        owner_of[client.rows] = owner
    numbers, labels = _labels_of(data.train)
    owners = owner_of[numbers]
    labels, owners = labels[owners >= 0], owners[owners >= 0]
    pairs = np.unique(owners * len(names) + labels)  # of a client and a class that it has
    rows = np.bincount(labels, minlength=len(names))
    clients = np.bincount(pairs % len(names), minlength=len(names))
    counts = zip(rows.tolist(), held, clients.tolist(), strict=True)
    return tuple(ClassCount(name, *of_one) for name, of_one in zip(names, counts, strict=True))


def _labels_of(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of the row, and the class, of each label."""
    if rows.tags is not None:
        tagged = np.flatnonzero(rows.tags)
        numbers = np.repeat(np.arange(len(rows)), np.diff(rows.offsets))
        return numbers[tagged], rows.tags[tagged].astype(np.int64) - 1
    if rows.labels.ndim == 2:
        numbers, classes = np.nonzero(rows.labels)
        return numbers, classes
    return np.arange(len(rows)), rows.labels


def describe_classes(classes: Sequence[ClassCount], *, trained_here: bool) -> list[str]:
    """Tell the classes in order, and warn of those that look wrong.

    Args:
        classes: All of them.
        trained_here: False where nodes bring the training rows, and none are known.
    """
    if not classes:
        return []
    shown = ", ".join(
        f"{index} = {one.name!r} "
        f"({f'{one.train_rows:,} + ' if trained_here else ''}{one.evaluation_rows:,})"
        for index, one in enumerate(classes[:_MOST_SHOWN])
    )
    if len(classes) > _MOST_SHOWN:
        shown += f" and {len(classes) - _MOST_SHOWN} more"
    rows = "rows to train on + to evaluate on" if trained_here else "rows to evaluate on"
    lines = [f"Classes ({rows}): {shown}."]
    for alike in _look_alike(one.name for one in classes):
        lines.append(
            f"Warning: the classes {_listed(alike)} differ in blanks or capitals alone. If they "
            "are one, mend the labels."
        )
    never = [one.name for one in classes if not one.train_rows and not one.evaluation_rows]
    if not any(one.evaluation_rows for one in classes):  # data.eval-on = "clients"
        return lines + (_warning(never, "no row at all") if trained_here else [])
    if trained_here:
        untrained = [one.name for one in classes if not one.train_rows and one.evaluation_rows]
        unseen = [one.name for one in classes if one.train_rows and not one.evaluation_rows]
        lines += _warning(untrained, "no row to train on")
        lines += _warning(unseen, "no row to evaluate on")
    lines += _warning(never, "no row at all" if trained_here else "no row to evaluate on")
    return lines


def _warning(names: list[str], lack: str) -> list[str]:
    if not names:
        return []
    which = "class" if len(names) == 1 else "classes"
    return [f"Warning: {lack} for the {which} {_listed(names)}."]


def _look_alike(names: Iterable[str]) -> list[list[str]]:
    groups = defaultdict(list)
    for name in names:
        groups[" ".join(name.split()).casefold()].append(name)
    return [group for group in groups.values() if len(group) > 1]


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_MOST_SHOWN])
    return shown if len(names) <= _MOST_SHOWN else f"{shown} and {len(names) - _MOST_SHOWN} more"
