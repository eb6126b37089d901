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

from fedpet.errors import ConfigError, RunError
from fedpet.tasks import TASKS, Task, kind_of
from fedpet.utils.named_callables import NamedCallables

__all__ = [
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
_LOWER_IS_BETTER: set[str] = set()  # of a user's metrics


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
    return metric not in _LOWER_IS_BETTER.union(*(kind.lower_is_better for kind in TASKS))


@dataclass(frozen=True)
class Assessment:
    """A model's outputs on all evaluation rows, measured.

    Attributes:
        value: The task's metric; NaN where an output is not finite.
        majority_baseline: The metric of the same answer for every row: the most frequent class, of
            equally frequent ones the first; for a regression the median of the labels. None for a
            task without such an answer.
        majority_class: That class; "" where rows have none.
        predicted: Name of each class -> fraction of the rows that it is predicted for. Empty for
            other tasks, and where `value` is NaN.
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
    majority_baseline: float | None = None
    majority_class: str = ""
    predicted: Mapping[str, float] = field(default_factory=dict)
    is_constant: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)
    by_class: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    by_client: Mapping[str, float] = field(default_factory=dict)


def assess(
    task: Task,
    logits: np.ndarray,
    labels: np.ndarray,
    clients: np.ndarray | None = None,
    written: Mapping[str, float] | None = None,
) -> Assessment:
    """Measure outputs, and what they are to be compared with.

    Args:
        task: Names the metrics and the classes.
        logits: As `measure` takes them.
        labels: As `measure` takes them.
        clients: A number for the client of each row, (n,); None where that is not known.
        written: Metrics that were taken of texts that the model wrote.

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
    metrics = measure(task, logits, labels, written)
    facts = kind_of(task).facts(task, logits, labels)
    baseline = facts.pop("baseline_outputs", None)
    return Assessment(
        metrics[task.metric],
        None if baseline is None else metric_value(task, baseline, labels),
        metrics=metrics,
        by_client={} if clients is None else _by_client(task, logits, labels, clients),
        **facts,
    )


def _by_client(
    task: Task, logits: np.ndarray, labels: np.ndarray, clients: np.ndarray
) -> dict[str, float]:
    """Measure the spread over clients of the metric that decides."""
    kind = kind_of(task)
    function = kind.metrics.get(task.metric)
    if function is None or not np.isfinite(logits).all():
        return {}
    order = np.argsort(clients, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(clients[order])) + 1)
    values = np.sort(
        [function(*kind.compared(task, logits[rows], labels[rows])) for rows in groups]
    )
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


def metric_value(task: Task, logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the metric that decides, see `measure`.

    Example:
        >>> task = Task("classification", ("no", "yes"), "accuracy")
        >>> metric_value(task, np.array([[0.1, 0.9], [0.8, 0.2]]), np.array([1, 1]))
        0.5
    """
    return measure(task, logits, labels)[task.metric]


def measure(
    task: Task, logits: np.ndarray, labels: np.ndarray, written: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Take every metric of a task: the built-in ones of its kind, and the user's.

    Args:
        task: Its metrics. "f1" is that of class 1 where there are two classes, else as "macro_f1":
            the mean over the classes that occur in labels or predictions. "weighted_f1" weighs them
            by their rows, "balanced_accuracy" is the mean recall of the classes that have rows.
        logits: Outputs, shape (n, task.num_outputs), or (n,) for a regression.
        labels: Class indices, or values: shape (n,), at least one.
        written: As of `assess`.

    Returns:
        By name. A correlation with a constant is 0. NaN where an output is not finite: such a
        model has no quality, and the user's functions are not called with its outputs.

    Raises:
        ValueError: No rows, or shapes that do not belong together.
        ConfigError: No metric has the name that decides, or a user's cannot be imported.
        RunError: A user's metric fails, or returns what is no number.
    """
    kind = kind_of(task)
    kind.check_outputs(task, logits, labels)
    if not np.isfinite(logits).all():
        return dict.fromkeys((*kind.metrics, task.metric), math.nan)
    compared = kind.compared(task, logits, labels)
    found = {name: function(*compared) for name, function in kind.metrics.items()}
    found |= written or {}
    for name in task.metrics:
        if name in kind.written_metrics:
            continue
        found.update(_foreign(name, EvalPrediction(logits, labels)))
    if task.metric not in found:
        raise ConfigError(
            f"data.metric must be one of the metrics that are taken, which are "
            f"{', '.join(found)}, got {task.metric!r}."
        )
    return found


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
