"""Compute the loss of local steps: the task's own or a registered one, and FedProx's gradient.

Where clients' labels are skewed, local training first learns each client's label shares, and the
average swings with the round's clients. Logit adjustment takes that out of the task's loss: the
logits are compared after `strength * log share` of each class is added, so what is left to learn is
the text.

FedProx's proximal term, mu / 2 |v - v_global|^2 over the values that are sent, pulls a client's
work towards the point it began at.

Source: Menon et al., ICLR 2021, arXiv:2007.07314 (logit-adjusted softmax cross-entropy); Li et
al., MLSys 2020, arXiv:1812.06127 (FedProx). Ours: the shares are the client's own, one row a class
added so that none is zero; the proximal term counts in the values that are sent, not in whatever
is trained for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fedpet.utils.named_callables import NamedCallables

if TYPE_CHECKING:
    from fedpet.data import Task

__all__ = [
    "LOSSES",
    "Loss",
    "client_loss",
    "logit_shift",
    "proximal_gradient",
    "register_loss",
    "row_losses",
]

# Of a model's outputs, an object with `logits`, and the batch's labels: a scalar.
Loss = Callable[[Any, Tensor], Tensor]
_Loss = TypeVar("_Loss", bound=Loss)

LOSSES: NamedCallables[Loss] = NamedCallables("loss", "fedpet.register_loss", only_registered=True)


def register_loss(name: str) -> Callable[[_Loss], _Loss]:
    """Make a loss known by a name, for `training.loss`.

    It is called with the model's outputs and a batch's labels, and gives a scalar. Nodes and Ray's
    workers import it, so it must stand in a module that they can import; there the same key may
    also name it as "package.module:function".

    Args:
        name: The name.

    Raises:
        ConfigError: The name belongs to another function.

    Example:
        >>> @register_loss("smoothed")
        ... def smoothed(outputs, labels):
        ...     return torch.nn.functional.cross_entropy(
        ...         outputs.logits, labels, label_smoothing=0.1)
    """

    def register(function: _Loss) -> _Loss:
        LOSSES.add(name, function)
        return function

    return register


def client_loss(
    labels: np.ndarray, task: Task, strength: float, device: torch.device, name: str = ""
) -> Loss:
    """Return the loss that a client trains on.

    Args:
        labels: Of all rows that the client trains on.
        task: Cross-entropy of adjusted logits over classes, mean squared error for a regression.
        strength: Of the adjustment; 0 leaves the logits alone.
        device: Of the logits.
        name: Of a registered loss, or its import path, in place of the task's; that one is not
            adjusted.

    Raises:
        ConfigError: No such loss.
    """
    if name:
        return LOSSES.find(name)
    if task.kind == "regression":
        return lambda out, targets: nn.functional.mse_loss(out.logits.squeeze(-1), targets)
    shift = torch.from_numpy(logit_shift(labels, task, strength)).to(device)
    return lambda out, targets: nn.functional.cross_entropy(out.logits + shift, targets)


def logit_shift(labels: np.ndarray, task: Task, strength: float) -> np.ndarray:
    """Return what is added to the logits of a client with these labels: float32, (classes,)."""
    counts = np.bincount(labels, minlength=task.num_outputs) + 1.0
    shift: np.ndarray = (strength * np.log(counts / counts.sum())).astype(np.float32)
    return shift


def row_losses(logits: Tensor, targets: Tensor, task: Task) -> Tensor:
    """Compute the task's loss of each row, (rows,), of logits that are adjusted already."""
    if task.kind == "regression":
        return nn.functional.mse_loss(logits.squeeze(-1), targets, reduction="none")
    return nn.functional.cross_entropy(logits, targets, reduction="none")


def proximal_gradient(
    mu: float, trained: Sequence[Tensor], computed: Sequence[Callable[[], Tensor]] = ()
) -> Callable[[], None]:
    """Return what adds the gradient of mu / 2 |v - v now|^2 to gradients in place.

    Args:
        mu: Above 0.
        trained: Leaves with gradients, whose numbers are sent as they are.
        computed: Each gives values that are sent and are no leaf, as a function of leaves: there
            the term goes back by autograd.

    Returns:
        To be called after each backward pass.
    """
    starts = [tensor.detach().clone() for tensor in trained]
    with torch.no_grad():
        points = [values().detach().clone() for values in computed]

    def add() -> None:
        for tensor, start in zip(trained, starts, strict=True):
            assert tensor.grad is not None
            tensor.grad.add_(tensor.detach() - start, alpha=mu)
        for values, point in zip(computed, points, strict=True):
            term = mu / 2 * (values() - point).square().sum()
            term.backward()

    return add
