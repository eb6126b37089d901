"""Compute the loss of local steps: the task's own or a registered one, and FedProx's gradient.

FedProx's proximal term, mu / 2 |v - v_global|^2 over the values that are sent, pulls a client's
work towards the point it began at.

A task's own loss stands in its file in fedpet/tasks/.

Source: Li et al., MLSys 2020, arXiv:1812.06127 (FedProx). Ours: the proximal term counts in the
values that are sent, not in whatever is trained for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from fedpet.tasks import BatchLoss, kind_of
from fedpet.utils.named_callables import NamedCallables

if TYPE_CHECKING:
    import numpy as np

    from fedpet.data import Task

__all__ = [
    "LOSSES",
    "Loss",
    "client_loss",
    "proximal_gradient",
    "register_loss",
]

# Of a model's outputs, an object with `logits`, and the batch's labels: a scalar.
Loss = Callable[[Any, Tensor], Tensor]
_Loss = TypeVar("_Loss", bound=Loss)

LOSSES: NamedCallables[Loss] = NamedCallables("loss", "fedpet.register_loss", only_registered=True)


def register_loss(name: str) -> Callable[[_Loss], _Loss]:
    """Make a loss known by a name, for `training.loss`.

    It is called with the model's outputs and a batch's labels, and gives a scalar. A language
    model's labels are its tokens, (rows, tokens), with -100 for those that are none: unshifted.
    Nodes and Ray's workers import it, so it must stand in a module that they can import; there the
    same key may also name it as "package.module:function".

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
) -> BatchLoss:
    """Return the loss that a client trains on, a function of the model, a batch and its labels.

    Args:
        labels: Of all rows that the client trains on.
        task: Cross-entropy of adjusted logits over classes, mean squared error for a regression,
            cross-entropy of tokens for a language model.
        strength: Of the adjustment; 0 leaves the logits alone.
        device: Of the logits.
        name: Of a registered loss, or its import path, in place of the task's; that one is not
            adjusted.

    Raises:
        ConfigError: No such loss.
    """
    if name:
        registered = LOSSES.find(name)
        return lambda model, inputs, targets: registered(model(**inputs), targets)
    return kind_of(task).client_loss(task, labels, strength, device)


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
