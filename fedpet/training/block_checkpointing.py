"""Recompute each block of a transformer in the backward pass, instead of storing its activations.

transformers' own checkpointing (Chen et al., 2016, arXiv:1604.06174) does it, for blocks in
training mode. Here a block is in that mode where its parts are not, so that dropout stays off.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from fedpet.errors import ConfigError

__all__ = ["check_checkpointing", "checkpoint_blocks", "recomputes_blocks"]


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
    check_checkpointing(model)
    blocks = _blocks(model)
    if not any(block.gradient_checkpointing for block in blocks):
        known: Any = model  # later versions of transformers have another name for it
        later = getattr(known, "activation_checkpointing_enable", None)
        (later or known.gradient_checkpointing_enable)({"use_reentrant": False})
    for block in blocks:
        block.training = True


def recomputes_blocks(model: nn.Module) -> bool:
    """Tell whether a backward pass computes the blocks of this model again."""
    return any(block.gradient_checkpointing and block.training for block in _blocks(model))


_known: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()


def _blocks(model: nn.Module) -> list[Any]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    if model not in _known:  # asked for every client, and walking the tree takes long
        _known[model] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    return _known[model]
