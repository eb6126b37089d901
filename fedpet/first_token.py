"""Training passes that leave out what the classifier never reads.

    ... -> model -> [training] -> client -> ...

In:  an encoder whose classifier reads its first token ([CLS], <s>) and no other.
Out: passes whose last block computes everything after its attention for that token alone.

The last attention needs all tokens, as keys and values; what follows it (norm, feed-forward part,
norm) acts on each token alone, and of all tokens but the first nobody asks. Forward and backward
of a block's feed-forward part, two thirds of its work, fall away: a ninth of a step in six blocks.
Logits and gradients are the same up to the order in which sums are rounded.

Whether a model is of that kind is not looked up but tried, once a model: what the last block gives
for the other tokens is replaced by NaN, which reaches the logits wherever anything reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fedpet.errors import ConfigError
from fedpet.positions import find_positions

__all__ = ["check_first_token", "first_token_only"]

_CLOSENESS = 1e-3  # of the block's outputs for the first token, relative; wrong ones differ by 1
_known: WeakKeyDictionary[nn.Module, nn.Module | None] = WeakKeyDictionary()


def check_first_token(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    """Refuse a model whose passes cannot be cut.

    Args:
        model: Left as it is.
        batch: What it is called with; a row is enough.

    Raises:
        ConfigError: The classifier reads other tokens, or the last block cannot be cut.
    """
    if _norm_of(model, batch) is None:
        raise ConfigError(
            "training.first-token-only needs an encoder that normalises after each residual sum, "
            "and a classifier that reads its first token alone, as BERT's do; "
            f"{type(model).__name__} is no such model: leave the key out."
        )


@contextmanager
def first_token_only(model: nn.Module, batch: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it, passes compute the last feed-forward part at the first token only.

    Args:
        model: In training or evaluation mode.
        batch: What it is called with, to try it on; a row is enough.

    Raises:
        ConfigError: See `check_first_token`.
    """
    check_first_token(model, batch)
    norm = _norm_of(model, batch)
    assert norm is not None
    with _hooked(norm.register_forward_pre_hook(_first_of_all)):
        yield


def _norm_of(model: nn.Module, batch: Mapping[str, Tensor]) -> nn.Module | None:
    """What `_find` found for this model, once."""
    if model not in _known:
        _known[model] = _find(model, batch)
    return _known[model]


def _first_of_all(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0][:, :1], *args[1:])


@torch.no_grad()
def _find(model: nn.Module, batch: Mapping[str, Tensor]) -> nn.Module | None:
    """The norm after the last block's attention, where cutting there changes no logit."""
    norms = [p for p in find_positions(model) if p.role == "attention-norm"]
    if not norms or any(p.stack != "encoder" for p in norms):
        return None
    name = norms[-1].name
    block = model.get_submodule(_block_of(name, norms[-1].layer))
    norm = model.get_submodule(name)
    mode = model.training
    model.eval()
    try:
        whole = _output(model, block, batch)
        with _hooked(norm.register_forward_pre_hook(_first_of_all)):
            cut = _output(model, block, batch)
        if cut.shape != whole[:, :1].shape or not _alike(cut, whole[:, :1]):
            return None
        with _hooked(block.register_forward_hook(_nan_beyond_first)):
            logits = model(**batch).logits
        return norm if bool(logits.isfinite().all()) else None
    except (RuntimeError, ValueError, IndexError):
        return None  # a block that cannot be cut says so by a shape that does not fit
    finally:
        model.train(mode)


def _block_of(name: str, layer: int | None) -> str:
    """`a.layer.5` of `a.layer.5.attention.norm`: up to the number of the layer."""
    parts = name.split(".")
    return ".".join(parts[: parts.index(str(layer)) + 1])


def _output(model: nn.Module, block: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """What a block gives when the model is called."""
    seen: list[Tensor] = []
    with _hooked(block.register_forward_hook(lambda _, __, out: seen.append(_hidden(out)))):
        model(**batch)
    return seen[-1]


def _hidden(output: Any) -> Tensor:
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, Tensor)
    return hidden


def _nan_beyond_first(module: nn.Module, args: Any, output: Any) -> Any:
    hidden = _hidden(output).clone()
    hidden[:, 1:] = torch.nan
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _alike(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).norm() <= _CLOSENESS * other.norm())


@contextmanager
def _hooked(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
