"""How good a model's outputs are: one number, by the task's metric, and what it must be above.

In:  outputs of all evaluation rows, and their labels.
Out: accuracy, F1, Matthews' correlation or Pearson's correlation, in float64; beside it the
     majority baseline, which is what a model has that learned nothing but the most frequent class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedpet.data.task import Task


@dataclass(frozen=True)
class Assessment:
    """A model's outputs on all evaluation rows.

    Attributes:
        value: The task's metric; NaN where an output is not finite.
        majority_baseline: The metric of the same answer for every row: the most frequent class, of
            equally frequent ones the first; for a regression any constant, whose correlation is 0.
        majority_class: That class; "" for a regression.
        predicted: Name of each class -> fraction of the rows that it is predicted for. Empty for
            a regression, and where `value` is NaN.
        is_constant: All of several rows have one prediction: one class, or one value.
    """

    value: float
    majority_baseline: float
    majority_class: str
    predicted: Mapping[str, float]
    is_constant: bool


def assess(task: Task, logits: np.ndarray, labels: np.ndarray) -> Assessment:
    """Measure outputs, and say what they are to be compared with.

    Args:
        task: Names the metric and the classes.
        logits: As `metric_value` takes them.
        labels: As `metric_value` takes them.

    Raises:
        ValueError: No rows, or shapes that do not belong together.

    Example:
        >>> task = Task("classification", ("no", "yes"), "accuracy")
        >>> logits = np.array([[0.1, 0.9], [0.2, 0.8], [0.4, 0.6]])
        >>> found = assess(task, logits, np.array([1, 1, 0]))
        >>> found.predicted, found.is_constant
        ({'no': 0.0, 'yes': 1.0}, True)
    """
    value = metric_value(task, logits, labels)
    finite = bool(np.isfinite(logits).all())
    if task.kind == "regression":
        return Assessment(value, 0.0, "", {}, finite and _is_constant(logits))
    majority = int(np.bincount(labels, minlength=task.num_outputs).argmax())
    same_answer = np.zeros((len(labels), task.num_outputs))
    same_answer[:, majority] = 1.0
    counts = np.bincount(logits.argmax(axis=1), minlength=task.num_outputs)
    names = task.label_names
    predicted = dict(zip(names, (counts / len(labels)).tolist(), strict=True)) if finite else {}
    return Assessment(
        value,
        metric_value(task, same_answer, labels),
        names[majority],
        predicted,
        finite and len(labels) > 1 and int(np.count_nonzero(counts)) == 1,
    )


def _is_constant(outputs: np.ndarray) -> bool:
    """Whether outputs are one value up to float32's rounding, over more than one row."""
    return len(outputs) > 1 and bool(np.ptp(outputs) <= 1e-6 * np.abs(outputs).max())


def metric_value(task: Task, logits: np.ndarray, labels: np.ndarray) -> float:
    """Measure a model's outputs; higher is better, 1 is perfect.

    Args:
        task: Names the metric: "accuracy"; "f1", of class 1 where there are two classes, else the
            mean over the classes that occur in labels or predictions; "matthews"; "pearson".
        logits: Outputs, shape (n, task.num_outputs), or (n,) for a regression.
        labels: Class indices, or values: shape (n,), at least one.

    Returns:
        The metric. A correlation with a constant is 0. NaN where an output is not finite: such a
        model has no quality.

    Raises:
        ValueError: No rows, or shapes that do not belong together.

    Example:
        >>> task = Task("classification", ("no", "yes"), "accuracy")
        >>> metric_value(task, np.array([[0.1, 0.9], [0.8, 0.2]]), np.array([1, 1]))
        0.5
    """
    num_rows = len(labels)
    shapes: list[tuple[int, ...]] = [(num_rows, task.num_outputs)]
    if task.kind == "regression":
        shapes.append((num_rows,))
    if num_rows == 0 or logits.shape not in shapes:
        raise ValueError(
            f"{num_rows} labels need outputs of shape {shapes[0]} with at least one row, got "
            f"{logits.shape}."
        )
    if not np.isfinite(logits).all():
        return float("nan")
    if task.metric == "pearson":
        return _correlation(logits.reshape(num_rows), labels)
    confusion = _confusion(logits.argmax(axis=1), labels, task.num_outputs)
    if task.metric == "accuracy":
        return float(np.trace(confusion) / num_rows)
    if task.metric == "f1":
        return _f1(confusion)
    assert task.metric == "matthews", task.metric
    return _matthews(confusion)


def _confusion(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Rows counted by label and prediction: float64 (num_classes, num_classes)."""
    cells = labels.astype(np.int64) * num_classes + predictions
    counts = np.bincount(cells, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes).astype(np.float64)


def _f1(confusion: np.ndarray) -> float:
    """2 tp / (2 tp + fp + fn), which is 2 tp over how often a class is label or prediction."""
    occurs = confusion.sum(axis=0) + confusion.sum(axis=1)  # (num_classes,)
    hits = 2 * np.diag(confusion)
    if len(confusion) == 2:
        return float(hits[1] / occurs[1]) if occurs[1] else 0.0
    return float(np.mean(hits[occurs > 0] / occurs[occurs > 0]))


def _matthews(confusion: np.ndarray) -> float:
    """Gorodkin's correlation of two assignments to K classes; Matthews' where K is 2."""
    n = confusion.sum()
    predicted, true = confusion.sum(axis=0), confusion.sum(axis=1)
    spread = np.sqrt(n**2 - predicted @ predicted) * np.sqrt(n**2 - true @ true)
    return float((n * np.trace(confusion) - predicted @ true) / spread) if spread else 0.0


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    a, b = a - a.mean(), b - b.mean()
    spread = np.sqrt(a @ a) * np.sqrt(b @ b)
    return float(np.clip(a @ b / spread, -1.0, 1.0)) if spread else 0.0
