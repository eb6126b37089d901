"""Make the optimiser of local steps, and state how its learning rates rise and fall."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from fedpet.config import TrainingConfig

__all__ = ["make_optimizer", "rate_factor", "round_factor"]


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
        schedule: "constant"; "linear" or "cosine", which fall to 0 at the end.
        progress: In [0, 1]: of a run's rounds, or of a search's steps.

    Example:
        >>> rate_factor("linear", 0.25), rate_factor("constant", 0.25), rate_factor("cosine", 0.5)
        (0.75, 1.0, 0.5)
    """
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    return {"constant": 1.0, "linear": max(0.0, 1.0 - progress)}[schedule]


def round_factor(training: TrainingConfig, server_round: int, num_rounds: int) -> float:
    """Return the factor of all learning rates in a round.

    Args:
        training: Its schedule; its warm-up, over whose rounds rates rise from 1 / (rounds + 1).
        server_round: Counted from 1.
        num_rounds: Of the run.

    Example:
        >>> from fedpet import TrainingConfig
        >>> training = TrainingConfig(schedule="linear", warmup_rounds=1)
        >>> [round_factor(training, server_round, 4) for server_round in (1, 2, 3, 4)]
        [0.5, 0.75, 0.5, 0.25]
    """
    progress = min(max(server_round - 1, 0) / num_rounds, 1.0)
    factor = rate_factor(training.schedule_in_force, progress)
    if server_round <= training.warmup_rounds:
        factor *= server_round / (training.warmup_rounds + 1)
    return factor
