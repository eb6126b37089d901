"""Predict a number of each text or pair: squared error, correlation."""

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

__all__ = ["REGRESSION_NAMES", "Regression"]

# What the one output is called, since transformers leaves names out that are its own, and some
# architectures then take another number of outputs.
REGRESSION_NAMES = ("value",)


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    a, b = a - a.mean(), b - b.mean()
    spread = np.sqrt(a @ a) * np.sqrt(b @ b)
    return float(np.clip(a @ b / spread, -1.0, 1.0)) if spread else 0.0


def _mae(outputs: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(np.abs(outputs.astype(np.float64) - labels.astype(np.float64))))


@register_task("regression")
class Regression(LabelledTexts):
    """Give each text a number."""

    metrics: ClassVar[Mapping[str, Callable[..., float]]] = {"pearson": _pearson, "mae": _mae}
    lower_is_better = frozenset({"mae"})

    def set_labels(self, model_config: Any, task_names: Sequence[str]) -> None:
        """Write the one output into a model's configuration before it is built."""
        model_config.id2label = dict(enumerate(task_names or REGRESSION_NAMES))
        model_config.label2id = {name: i for i, name in model_config.id2label.items()}
        model_config.problem_type = "regression"

    def client_loss(
        self, task: Task, labels: np.ndarray, strength: float, device: torch.device
    ) -> BatchLoss:
        """Return the mean squared error; see `TaskKind.client_loss`."""
        from torch.nn.functional import mse_loss

        return lambda model, inputs, targets: mse_loss(model(**inputs).logits.squeeze(-1), targets)

    def row_losses(self, task: Task, logits: Tensor, targets: Tensor) -> Tensor:
        """Compute the squared error of each row, (rows,)."""
        from torch.nn.functional import mse_loss

        return mse_loss(logits.squeeze(-1), targets, reduction="none")

    def compared(self, task: Task, outputs: np.ndarray, labels: np.ndarray) -> tuple[Any, ...]:
        """Return outputs and labels, (n,) each."""
        return outputs.reshape(len(labels)), labels

    def facts(self, task: Task, outputs: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """Return the median's baseline, and whether all rows have one output."""
        finite = bool(np.isfinite(outputs).all())
        return {
            "baseline_outputs": np.full((len(labels), 1), np.median(labels)),
            "is_constant": finite and _is_constant(outputs),
        }


def _is_constant(outputs: np.ndarray) -> bool:
    """Tell whether outputs are one value up to float32's rounding, over more than one row."""
    return len(outputs) > 1 and bool(np.ptp(outputs) <= 1e-6 * np.abs(outputs).max())
