"""Training passes that leave out what the classifier never reads.

    ... -> model -> [training] -> client -> ...

In:  an encoder whose classifier reads its first token ([CLS], <s>) and no other.
Out: passes whose last block computes everything after its attention for that token alone.

The last attention needs all tokens, as keys and values; what follows it (its output projection,
norm, feed-forward part, norm) acts on each token alone, and of all tokens but the first nobody
asks. Nine of the twelve parts of a block's matrix products fall away, forward and backward: an
eighth of a step in six blocks. Logits and gradients are the same up to the order in which sums are
rounded.

Whether a model is of that kind is not looked up but tried, once a model: what the last block gives
for the other tokens is replaced by NaN, which reaches the logits wherever anything reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fedpet.errors import ConfigError
from fedpet.positions import find_positions

__all__ = ["check_first_token", "first_token_only"]

_CLOSENESS = 1e-3  # of the block's outputs for the first token, relative; wrong ones differ by 1
_known: WeakKeyDictionary[nn.Module, tuple[nn.Module, ...]] = WeakKeyDictionary()


def check_first_token(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    """Refuse a model whose passes cannot be cut.

    Args:
        model: Left as it is.
        batch: What it is called with; a row is enough.

    Raises:
        ConfigError: The classifier reads other tokens, or the last block cannot be cut.
    """
    if not _places_of(model, batch):
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
    with _cut(_known[model]):
        yield


def _places_of(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[nn.Module, ...]:
    """What `_find` found for this model, once."""
    if model not in _known:
        _known[model] = _find(model, batch)
    return _known[model]


@contextmanager
def _cut(places: tuple[nn.Module, ...]) -> Iterator[None]:
    """These modules see the first token alone.

    Where the projection gives one token, the residual sum repeats it for all, and the norm is
    given the first of the sum.
    """
    with ExitStack() as stack:
        for place in places:
            stack.enter_context(place.register_forward_pre_hook(_first_of_all))
        yield


def _first_of_all(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0][:, :1], *args[1:])


@torch.no_grad()
def _find(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[nn.Module, ...]:
    """The last attention's output projection and norm; () where cutting there changes logits."""
    found = {
        position.role: position
        for position in find_positions(model)
        if position.role in ("attention-output", "attention-norm") and position.kind != "block"
    }
    if len(found) < 2 or any(p.stack != "encoder" for p in found.values()):
        return ()
    places = tuple(model.get_submodule(position.name) for position in found.values())
    norm = found["attention-norm"]
    block = model.get_submodule(_block_of(norm.name, norm.layer))
    mode = model.training
    model.eval()
    try:
        whole = _output(model, block, batch)
        with _cut(places):
            cut = _output(model, block, batch)
        if cut.shape != whole[:, :1].shape or not _alike(cut, whole[:, :1]):
            return ()
        with block.register_forward_hook(_nan_beyond_first):
            logits = model(**batch).logits
        return places if bool(logits.isfinite().all()) else ()
    except (RuntimeError, ValueError, IndexError):
        return ()  # a block that cannot be cut says so by a shape that does not fit
    finally:
        model.train(mode)


def _block_of(name: str, layer: int | None) -> str:
    """`a.layer.5` of `a.layer.5.attention.norm`: up to the number of the layer."""
    parts = name.split(".")
    return ".".join(parts[: parts.index(str(layer)) + 1])


def _output(model: nn.Module, block: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """What a block gives when the model is called."""
    seen: list[Tensor] = []
    with block.register_forward_hook(lambda _, __, out: seen.append(_hidden(out))):
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
