"""Give each text any number of classes: a logit a class, each a question of its own.

`data.label-column` holds a list of class names, or of indices, a row; it may be empty. The loss is
the mean binary cross-entropy over rows and classes, as transformers has it for such a problem, and
a class is predicted where its probability is above a half, that is its logit above 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedpet.tasks.task_kind import (
    BatchLoss,
    RawRows,
    refuse_class_settings,
    register_task,
)
from fedpet.tasks.text_rows import LabelledTexts

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fedpet.config import DataConfig, Experiment
    from fedpet.data.split_rows import Split
    from fedpet.tasks.task import Task

__all__ = ["MultiLabel"]


# Of predictions and labels: bool (n, classes) each.


def _micro_f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    return _f1(float((predicted & labels).sum()), float(predicted.sum() + labels.sum()))


def _macro_f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    hits, occurs = (predicted & labels).sum(0), predicted.sum(0) + labels.sum(0)
    there = occurs > 0
    return float(np.mean(2 * hits[there] / occurs[there])) if there.any() else 0.0


def _subset_accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    return float((predicted == labels).all(1).mean())


def _f1(hits: float, occurs: float) -> float:
    return 2 * hits / occurs if occurs else 0.0


@register_task("multi-label-classification")
class MultiLabel(LabelledTexts):
    """Give each text any number of classes."""

    metrics: ClassVar[Mapping[str, Callable[..., float]]] = {
        "micro_f1": _micro_f1,
        "macro_f1": _macro_f1,
        "subset_accuracy": _subset_accuracy,
    }
    has_classes = True
    has_label_lists = True
    stacks = False

    def check_experiment(self, experiment: Experiment) -> None:
        """Refuse what goes by one class a row; see `TaskKind.check_experiment`."""
        refuse_class_settings(experiment)

    def read(self, split: Split, data: DataConfig, task: Task) -> RawRows:
        """Read texts and lists of classes; see `TaskKind.read`."""
        from fedpet.tasks.label_lists import encode_lists, read_lists

        texts = split.texts(data.text_columns)
        split.check_texts(texts, data.text_columns)
        lists = list(read_lists(split.labels(data.label_column), split.where))
        classes, lengths = encode_lists(lists, task.label_names, split.where)
        labels = np.zeros((len(lists), task.num_outputs), dtype=np.float32)
        labels[np.repeat(np.arange(len(lists)), lengths), classes] = 1.0
        return RawRows(texts, labels)

    def set_labels(self, model_config: Any, task_names: Sequence[str]) -> None:
        """Write the classes into a model's configuration before it is built."""
        model_config.id2label = dict(enumerate(task_names))
        model_config.label2id = {name: index for index, name in enumerate(task_names)}
        model_config.problem_type = "multi_label_classification"

    def client_loss(
        self, task: Task, labels: np.ndarray, strength: float, device: torch.device
    ) -> BatchLoss:
        """Return the mean binary cross-entropy; see `TaskKind.client_loss`."""
        return lambda model, inputs, targets: self.row_losses(
            task, model(**inputs).logits, targets
        ).mean()

    def row_losses(self, task: Task, logits: Tensor, targets: Tensor) -> Tensor:
        """Compute the binary cross-entropy of each row, a mean over classes: (rows,)."""
        from torch.nn.functional import binary_cross_entropy_with_logits

        return binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)

    def compared(self, task: Task, outputs: np.ndarray, labels: np.ndarray) -> tuple[Any, ...]:
        """Return predictions and labels, bool (n, classes)."""
        return outputs > 0, labels > 0

    def facts(self, task: Task, outputs: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """Return the baseline, the classes that most rows have, and counts by class."""
        finite, names = bool(np.isfinite(outputs).all()), task.label_names
        usual = np.where(labels.mean(0) > 0.5, 1.0, -1.0)
        predicted, true = self.compared(task, outputs, labels)
        found: dict[str, Any] = {
            "baseline_outputs": np.broadcast_to(usual, labels.shape),
            "is_constant": finite and len(labels) > 1 and bool((predicted == predicted[0]).all()),
        }
        if finite:
            found["predicted"] = dict(zip(names, predicted.mean(0).tolist(), strict=True))
            counts = zip(true.sum(0), predicted.sum(0), (true & predicted).sum(0), strict=True)
            by_class = [(int(rows), int(answers), int(hits)) for rows, answers, hits in counts]
            found["by_class"] = dict(zip(names, by_class, strict=True))
        return found
