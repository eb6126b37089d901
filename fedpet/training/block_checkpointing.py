"""Recompute each block of a transformer in the backward pass, instead of storing its activations.

transformers' own checkpointing (Chen et al., 2016, arXiv:1604.06174) does it, for blocks in
training mode. Here a block is in that mode where its parts are not, so that dropout stays off.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fedpet.errors import ConfigError

__all__ = ["check_checkpointing", "checkpoint_blocks"]


def check_checkpointing(model: nn.Module) -> None:
    """Refuse a model that transformers has no checkpointing for.

    Raises:
        ConfigError: It is one.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(
            f"training.gradient-checkpointing needs a model whose blocks transformers can "
            f"recompute, and {type(model).__name__} is none: set it to false."
        )


def checkpoint_blocks(model: nn.Module) -> None:
    """Have the blocks of a model recomputed in its next backward passes.

    `eval()` of the model turns it off until the next call.

    Raises:
        ConfigError: transformers has no checkpointing for it.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    check_checkpointing(model)
    blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not any(block.gradient_checkpointing for block in blocks):
        known: Any = model  # later versions of transformers have another name for it
        later = getattr(known, "activation_checkpointing_enable", None)
        (later or known.gradient_checkpointing_enable)({"use_reentrant": False})
    for block in blocks:
        block.training = True
