"""Measure a model's outputs: every metric of the task, and the majority baseline.

In:  outputs of all evaluation rows, and their labels.
Out: all metrics by name, in float64, of which `data.metric` names the one that decides; and the
     majority baseline, which is what a model has that learned nothing but the most frequent class.

A user's own metrics are functions as `transformers.Trainer` takes them for `compute_metrics`:
from predictions and label ids to numbers by name. `data.metrics` names them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np

from fedpet.data.task import Task
from fedpet.errors import ConfigError, RunError
from fedpet.utils.named_callables import NamedCallables

__all__ = [
    "BUILT_IN",
    "METRICS",
    "Assessment",
    "EvalPrediction",
    "assess",
    "greater_is_better",
    "measure",
    "metric_value",
    "register_metric",
]


class EvalPrediction(NamedTuple):
    """A model's outputs on all evaluation rows, under the names that `Trainer` uses."""

    predictions: np.ndarray  # float32, (rows, outputs)
    label_ids: np.ndarray  # (rows,): class indices, or values


Metric = Callable[[Any], Any]  # of an `EvalPrediction`: a number, or numbers by name
_Metric = TypeVar("_Metric", bound=Metric)

METRICS: NamedCallables[Metric] = NamedCallables(
    "metric", "fedpet.register_metric", only_registered=False
)
_LOWER_IS_BETTER = {"mae"}


def register_metric(name: str, *, greater_is_better: bool = True) -> Callable[[_Metric], _Metric]:
    """Make a function of predictions and labels known by a name, for `data.metrics`.

    Args:
        name: The name; also that of the number, where the function returns one alone.
        greater_is_better: What holds for the number of this name, where it decides.

    Raises:
        ConfigError: The name belongs to another function.

    Example:
        >>> @register_metric("error_rate", greater_is_better=False)
        ... def error_rate(eval_pred):
        ...     logits, labels = eval_pred
        ...     return {"error_rate": float((logits.argmax(axis=1) != labels).mean())}
    """

    def register(function: _Metric) -> _Metric:
        METRICS.add(name, function)
        if not greater_is_better:
            _LOWER_IS_BETTER.add(name)
        return function

    return register


def greater_is_better(metric: str) -> bool:
    """Tell whether more is better of a metric.

    Example:
        >>> greater_is_better("accuracy"), greater_is_better("mae")
        (True, False)
    """
    return metric not in _LOWER_IS_BETTER


@dataclass(frozen=True)
class Assessment:
    """A model's outputs on all evaluation rows, measured.

    Attributes:
        value: The task's metric; NaN where an output is not finite.
        majority_baseline: The metric of the same answer for every row: the most frequent class, of
            equally frequent ones the first; for a regression the median of the labels.
        majority_class: That class; "" for a regression.
        predicted: Name of each class -> fraction of the rows that it is predicted for. Empty for
            a regression, and where `value` is NaN.
        is_constant: All of several rows have one prediction: one class, or one value.
        metrics: Every metric by name, `value` among them.
        by_class: Name of each class -> its rows, the rows predicted as it, and those of both.
            Empty where `predicted` is.
        by_client: The metric on each client's rows: its "mean" over the clients, "worst_decile"
            (the mean over the worst tenth, one client at least), "worst" and "best"; how many
            "clients", and their "median_rows". Empty where rows name no client, where `value` is
            NaN, and where the metric is the user's.
    """

    value: float
    majority_baseline: float
    majority_class: str
    predicted: Mapping[str, float]
    is_constant: bool
    metrics: Mapping[str, float] = field(default_factory=dict)
    by_class: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    by_client: Mapping[str, float] = field(default_factory=dict)


def assess(
    task: Task, logits: np.ndarray, labels: np.ndarray, clients: np.ndarray | None = None
) -> Assessment:
    """Measure outputs, and what they are to be compared with.

    Args:
        task: Names the metrics and the classes.
        logits: As `measure` takes them.
        labels: As `measure` takes them.
        clients: A number for the client of each row, (n,); None where that is not known.

    Raises:
        ValueError: No rows, or shapes that do not belong together.
        ConfigError: No metric has the name that decides.

    Example:
        >>> task = Task("classification", ("no", "yes"), "accuracy")
        >>> logits = np.array([[0.1, 0.9], [0.2, 0.8], [0.4, 0.6]])
        >>> found = assess(task, logits, np.array([1, 1, 0]))
        >>> found.predicted, found.is_constant
        ({'no': 0.0, 'yes': 1.0}, True)
        >>> round(found.metrics["macro_f1"], 6), round(found.majority_baseline, 6)
        (0.4, 0.666667)
    """
    metrics = measure(task, logits, labels)
    value = metrics[task.metric]
    finite = bool(np.isfinite(logits).all())
    spread = {} if clients is None else _by_client(task, logits, labels, clients)
    if task.kind == "regression":
        median = np.full((len(labels), 1), np.median(labels))
        baseline = metric_value(task, median, labels)
        constant = finite and _is_constant(logits)
        return Assessment(value, baseline, "", {}, constant, metrics, by_client=spread)
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
        metrics,
        dict(zip(names, _counts_by_class(task, logits, labels), strict=True)) if finite else {},
        spread,
    )


def _by_client(
    task: Task, logits: np.ndarray, labels: np.ndarray, clients: np.ndarray
) -> dict[str, float]:
    """Measure the spread over clients of the metric that decides."""
    function = BUILT_IN[task.kind].get(task.metric)
    if function is None or not np.isfinite(logits).all():
        return {}
    order = np.argsort(clients, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(clients[order])) + 1)
    values = np.sort([function(*_compared(task, logits[rows], labels[rows])) for rows in groups])
    if greater_is_better(task.metric):
        values = values[::-1]
    return {
        "clients": len(values),
        "median_rows": float(np.median([len(rows) for rows in groups])),
        "mean": float(values.mean()),
        "worst_decile": float(values[-max(1, len(values) // 10) :].mean()),
        "worst": float(values[-1]),
        "best": float(values[0]),
    }


def _counts_by_class(
    task: Task, logits: np.ndarray, labels: np.ndarray
) -> list[tuple[int, int, int]]:
    """Count the rows of each class, the rows predicted as it, and those of both."""
    counts = _confusion(logits.argmax(axis=1), labels, task.num_outputs)
    found = zip(counts.sum(axis=1), counts.sum(axis=0), np.diag(counts), strict=True)
    return [(int(rows), int(answers), int(hits)) for rows, answers, hits in found]


def _is_constant(outputs: np.ndarray) -> bool:
    """Tell whether outputs are one value up to float32's rounding, over more than one row."""
    return len(outputs) > 1 and bool(np.ptp(outputs) <= 1e-6 * np.abs(outputs).max())


def metric_value(task: Task, logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the metric that decides, see `measure`.

    Example:
        >>> task = Task("classification", ("no", "yes"), "accuracy")
        >>> metric_value(task, np.array([[0.1, 0.9], [0.8, 0.2]]), np.array([1, 1]))
        0.5
    """
    return measure(task, logits, labels)[task.metric]


def measure(task: Task, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Take every metric of a task: the built-in ones of its kind, and the user's.

    Args:
        task: Its metrics. "f1" is that of class 1 where there are two classes, else as "macro_f1":
            the mean over the classes that occur in labels or predictions. "weighted_f1" weighs them
            by their rows, "balanced_accuracy" is the mean recall of the classes that have rows.
        logits: Outputs, shape (n, task.num_outputs), or (n,) for a regression.
        labels: Class indices, or values: shape (n,), at least one.

    Returns:
        By name. A correlation with a constant is 0. NaN where an output is not finite: such a
        model has no quality, and the user's functions are not called with its outputs.

    Raises:
        ValueError: No rows, or shapes that do not belong together.
        ConfigError: No metric has the name that decides, or a user's cannot be imported.
        RunError: A user's metric fails, or returns what is no number.
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
    built_in = BUILT_IN[task.kind]
    if not np.isfinite(logits).all():
        return dict.fromkeys((*built_in, task.metric), math.nan)
    compared = _compared(task, logits, labels)
    found = {name: function(*compared) for name, function in built_in.items()}
    for name in task.metrics:
        found.update(_foreign(name, EvalPrediction(logits, labels)))
    if task.metric not in found:
        raise ConfigError(
            f"data.metric must be one of the metrics that are taken, which are "
            f"{', '.join(found)}, got {task.metric!r}."
        )
    return found


def _compared(task: Task, logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return what the built-in metrics of a task are functions of."""
    if task.kind == "regression":
        return logits.reshape(len(labels)), labels
    return (_confusion(logits.argmax(axis=1), labels, task.num_outputs),)


def _foreign(name: str, outputs: EvalPrediction) -> dict[str, float]:
    """Call a user's metric."""
    function = METRICS.find(name)
    try:
        returned = function(outputs)
    except Exception as error:  # whatever a stranger's function raises
        raise RunError(
            f"the metric {name!r} failed on the outputs of {len(outputs.label_ids)} rows: "
            f"{type(error).__name__}: {error}."
        ) from error
    numbers = returned if isinstance(returned, Mapping) else {name.rpartition(":")[2]: returned}
    try:
        return {str(key): float(number) for key, number in numbers.items()}
    except (TypeError, ValueError):
        raise RunError(
            f"the metric {name!r} must return a number, or numbers by name, got {returned!r}."
        ) from None


def _confusion(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Count rows by label and prediction: float64 (num_classes, num_classes)."""
    cells = labels.astype(np.int64) * num_classes + predictions
    counts = np.bincount(cells, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes).astype(np.float64)


def _accuracy(confusion: np.ndarray) -> float:
    return float(np.trace(confusion) / confusion.sum())


def _f1(confusion: np.ndarray) -> float:
    if len(confusion) != 2:
        return _macro_f1(confusion)
    hits, occurs = _hits_and_occurrences(confusion)
    return float(hits[1] / occurs[1]) if occurs[1] else 0.0


def _macro_f1(confusion: np.ndarray) -> float:
    hits, occurs = _hits_and_occurrences(confusion)
    return float(np.mean(hits[occurs > 0] / occurs[occurs > 0]))


def _weighted_f1(confusion: np.ndarray) -> float:
    hits, occurs = _hits_and_occurrences(confusion)
    rows = confusion.sum(axis=1)
    there = occurs > 0
    return float(rows[there] @ (hits[there] / occurs[there]) / rows.sum())


def _hits_and_occurrences(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split F1 of each class, 2 tp / (2 tp + fp + fn): the latter counts labels and predictions."""
    return 2 * np.diag(confusion), confusion.sum(axis=0) + confusion.sum(axis=1)


def _balanced_accuracy(confusion: np.ndarray) -> float:
    rows = confusion.sum(axis=1)
    return float(np.mean(np.diag(confusion)[rows > 0] / rows[rows > 0]))


def _matthews(confusion: np.ndarray) -> float:
    """Compute Gorodkin's correlation of two assignments to K classes; Matthews' where K is 2."""
    n = confusion.sum()
    predicted, true = confusion.sum(axis=0), confusion.sum(axis=1)
    spread = np.sqrt(n**2 - predicted @ predicted) * np.sqrt(n**2 - true @ true)
    return float((n * np.trace(confusion) - predicted @ true) / spread) if spread else 0.0


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    a, b = a - a.mean(), b - b.mean()
    spread = np.sqrt(a @ a) * np.sqrt(b @ b)
    return float(np.clip(a @ b / spread, -1.0, 1.0)) if spread else 0.0


def _mae(outputs: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(np.abs(outputs.astype(np.float64) - labels.astype(np.float64))))


# Kind of task -> its metrics: of the counts by label and prediction, or of outputs and labels.
BUILT_IN: Mapping[str, Mapping[str, Callable[..., float]]] = {
    "classification": {
        "accuracy": _accuracy,
        "f1": _f1,
        "macro_f1": _macro_f1,
        "weighted_f1": _weighted_f1,
        "balanced_accuracy": _balanced_accuracy,
        "matthews": _matthews,
    },
    "regression": {"pearson": _pearson, "mae": _mae},
}
