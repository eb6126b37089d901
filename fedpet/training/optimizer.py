"""Make the optimiser of local steps, and state how its learning rates fall."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

__all__ = ["make_optimizer", "rate_factor"]


def make_optimizer(
    groups: Mapping[str, nn.Parameter | list[nn.Parameter]],
    rate_of: Callable[[str], float],
    *,
    name: str = "adamw",
    weight_decay: float = 0.0,
    fused: bool | None = True,
) -> torch.optim.Optimizer:
    """Make an optimiser with a learning rate for each kind of module.

    Args:
        groups: What it moves, by kind of module.
        rate_of: Gives a kind's learning rate.
        name: "adamw" or "sgd".
        weight_decay: Towards the checkpoint, where what it moves are changes.
        fused: One pass over all numbers; None is torch's choice. They differ in the last bits.
    """
    tables = [
        {"params": group if isinstance(group, list) else [group], "lr": rate_of(kind)}
        for kind, group in groups.items()
    ]
    if name == "sgd":
        return torch.optim.SGD(tables, weight_decay=weight_decay, fused=fused)
    return torch.optim.AdamW(tables, betas=(0.9, 0.999), weight_decay=weight_decay, fused=fused)


def rate_factor(schedule: str, progress: float) -> float:
    """Return the factor of all learning rates when a fraction of the work is over.

    Args:
        schedule: "constant", or "linear", which falls to 0 at the end.
        progress: In [0, 1]: of a run's rounds, or of a search's steps.

    Example:
        >>> rate_factor("linear", 0.25), rate_factor("constant", 0.25)
        (0.75, 1.0)
    """
    return {"constant": 1.0, "linear": max(0.0, 1.0 - progress)}[schedule]
