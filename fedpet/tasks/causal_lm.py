"""Share what tasks of causal language models have in common: loss, weights and metrics by tokens.

A batch's loss is the mean over its label tokens; an update weighs its client's label tokens, and
metrics are over all label tokens, so a long row counts for more than a short one. Perplexity is the
exponential of the mean loss of a token, never a mean of perplexities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedpet.tasks.task_kind import (
    BatchLoss,
    TaskKind,
    refuse_class_settings,
    refuse_settings,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from fedpet.config import Experiment
    from fedpet.data.rows import Rows
    from fedpet.tasks.task import Task

__all__ = ["CausalTask"]

_MOST = 700.0  # nats a token, beyond which the exponential is no number


# Of the summed losses, the tokens predicted and the label tokens of each row: (n,) each.


def _loss(losses: np.ndarray, hits: np.ndarray, tokens: np.ndarray) -> float:
    return float(losses.sum() / tokens.sum())


def _perplexity(losses: np.ndarray, hits: np.ndarray, tokens: np.ndarray) -> float:
    return math.exp(min(_loss(losses, hits, tokens), _MOST))


def _token_accuracy(losses: np.ndarray, hits: np.ndarray, tokens: np.ndarray) -> float:
    return float(hits.sum() / tokens.sum())


class CausalTask(TaskKind):
    """Predict each label token from the tokens before it.

    `Rows.marks` names the label tokens and `Rows.labels` counts them, a number a row.
    """

    metrics: ClassVar[Mapping[str, Callable[..., float]]] = {
        "perplexity": _perplexity,
        "token_accuracy": _token_accuracy,
        "loss": _loss,
    }
    lower_is_better = frozenset({"perplexity", "loss"})
    model_class = "AutoModelForCausalLM"
    pipeline = "text-generation"
    has_head = False

    def check_experiment(self, experiment: Experiment) -> None:
        """Refuse what classifiers alone have; see `TaskKind.check_experiment`."""
        refuse_settings(
            experiment,
            {
                "training.cls-only = true skips tokens that a classifier never reads": (
                    experiment.training.cls_only
                ),
                "backbone.head = 'new' draws a head": experiment.backbone.head == "new",
            },
        )
        refuse_class_settings(experiment)

    def client_loss(
        self, task: Task, labels: np.ndarray, strength: float, device: torch.device
    ) -> BatchLoss:
        """Return the mean cross-entropy of label tokens; see `TaskKind.client_loss`."""
        from fedpet.training.token_loss import token_loss  # a later stage

        return token_loss

    def weight(self, rows: Rows, indices: np.ndarray) -> int:
        """Count the label tokens."""
        return int(rows.labels[indices].sum())

    def outputs(self, model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """Return each row's summed loss and its predicted label tokens, (rows, 2)."""
        from fedpet.training.token_loss import row_sums  # a later stage

        return row_sums(model, inputs, labels)

    def check_outputs(self, task: Task, outputs: np.ndarray, labels: np.ndarray) -> None:
        """Refuse outputs of another shape; see `TaskKind.check_outputs`."""
        if not len(labels) or outputs.shape != (len(labels), 2):
            raise ValueError(
                f"{len(labels)} rows need outputs of shape ({len(labels)}, 2), a sum of losses and "
                f"the tokens predicted, with at least one row, got {outputs.shape}."
            )

    def compared(self, task: Task, outputs: np.ndarray, labels: np.ndarray) -> tuple[Any, ...]:
        """Return by row the sum of losses, the tokens predicted, and the label tokens."""
        return outputs[:, 0], outputs[:, 1], labels
