"""Classify texts or pairs of texts: cross-entropy over classes, counts of predictions by label.

Where clients' labels are skewed, local training first learns each client's label shares, and the
average swings with the round's clients. Logit adjustment takes that out of the loss: the logits are
compared after `strength * log share` of each class is added, so what is left to learn is the text.

Source: Menon et al., ICLR 2021, arXiv:2007.07314 (logit-adjusted softmax cross-entropy). Ours: the
shares are the client's own, one row a class added so that none is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedpet.tasks.task_kind import BatchLoss, register_task
from fedpet.tasks.text_rows import LabelledTexts

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fedpet.tasks.task import Task

__all__ = ["Classification", "logit_shift"]


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


def logit_shift(labels: np.ndarray, task: Task, strength: float) -> np.ndarray:
    """Return what is added to the logits of a client with these labels: float32, (classes,)."""
    counts = np.bincount(labels, minlength=task.num_outputs) + 1.0
    shift: np.ndarray = (strength * np.log(counts / counts.sum())).astype(np.float32)
    return shift


@register_task("classification")
class Classification(LabelledTexts):
    """Give each text one of several classes."""

    metrics: ClassVar[Mapping[str, Callable[..., float]]] = {
        "accuracy": _accuracy,
        "f1": _f1,
        "macro_f1": _macro_f1,
        "weighted_f1": _weighted_f1,
        "balanced_accuracy": _balanced_accuracy,
        "matthews": _matthews,
    }
    has_classes = True

    def set_labels(self, model_config: Any, task_names: Sequence[str]) -> None:
        """Write the classes into a model's configuration before it is built."""
        model_config.id2label = dict(enumerate(task_names))
        model_config.label2id = {name: index for index, name in enumerate(task_names)}
        model_config.problem_type = "single_label_classification"

    def client_loss(
        self, task: Task, labels: np.ndarray, strength: float, device: torch.device
    ) -> BatchLoss:
        """Return the cross-entropy of adjusted logits; see `TaskKind.client_loss`."""
        import torch
        from torch.nn.functional import cross_entropy

        shift = torch.from_numpy(logit_shift(labels, task, strength)).to(device)
        return lambda model, inputs, targets: cross_entropy(model(**inputs).logits + shift, targets)

    def row_losses(self, task: Task, logits: Tensor, targets: Tensor) -> Tensor:
        """Compute the cross-entropy of each row, (rows,)."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(logits, targets, reduction="none")

    def compared(self, task: Task, outputs: np.ndarray, labels: np.ndarray) -> tuple[Any, ...]:
        """Count rows by label and prediction: float64 (classes, classes)."""
        return (_confusion(outputs.argmax(axis=1), labels, task.num_outputs),)

    def facts(self, task: Task, outputs: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """Return the majority's baseline, what is predicted, and counts by class."""
        finite = bool(np.isfinite(outputs).all())
        majority = int(np.bincount(labels, minlength=task.num_outputs).argmax())
        same_answer = np.zeros((len(labels), task.num_outputs))
        same_answer[:, majority] = 1.0
        names, counts = (
            task.label_names,
            np.bincount(outputs.argmax(axis=1), minlength=task.num_outputs),
        )
        found = {
            "baseline_outputs": same_answer,
            "majority_class": names[majority],
            "is_constant": finite and len(labels) > 1 and int(np.count_nonzero(counts)) == 1,
        }
        if finite:
            found["predicted"] = dict(zip(names, (counts / len(labels)).tolist(), strict=True))
            by_class = _counts_by_class(*self.compared(task, outputs, labels))
            found["by_class"] = dict(zip(names, by_class, strict=True))
        return found


def _counts_by_class(confusion: np.ndarray) -> list[tuple[int, int, int]]:
    """Count the rows of each class, the rows predicted as it, and those of both."""
    found = zip(confusion.sum(axis=1), confusion.sum(axis=0), np.diag(confusion), strict=True)
    return [(int(rows), int(answers), int(hits)) for rows, answers, hits in found]
