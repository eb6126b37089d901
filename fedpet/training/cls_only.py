"""Skip in training passes the tokens of the last block that the classifier never reads.

In:  an encoder whose classifier reads its first token ([CLS], <s>) and no other.
Out: passes whose last block computes the part that this token needs.

After the last attention each token goes its own way: output projection, norm and feed-forward part
act on single tokens. So the last block multiplies one vector a text, or one a text and head,
instead of one a token: a sixth less products in six blocks, forward and backward. Logits and
gradients are the same up to the order in which sums are rounded.

The shapes stay: the result for the first token is repeated for all as a view. Attention itself is
cut where it is the sdpa function of `transformers` or MPNet's own, see
`fedpet/training/cls_attention.py`; DeBERTa's stays whole.

A model qualifies by a test, run once: the last block's outputs for other tokens are replaced by
NaN, which reaches the logits if anything reads them.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fedpet.backbone.module_roles import Position, block_of, find_target_modules
from fedpet.errors import ConfigError
from fedpet.training.cls_attention import (
    Attention,
    asks_queries_apart,
    first_query,
    keep_first_token,
)

__all__ = ["check_first_token", "first_token_only", "reads_first_token"]

_PROJECTIONS = ("query", "key", "value")
_AFTER = ("attention-output", "attention-norm")
_CLOSENESS = 1e-3  # of the block's outputs for the first token, relative; wrong ones differ by 1


@dataclass(frozen=True)
class _CutPoints:
    """The modules at which the last block of a model is cut."""

    after: tuple[nn.Module, ...]  # the last attention's output projection and norm
    attention: Attention | None = None  # itself, where only its first query need be asked


_known: WeakKeyDictionary[nn.Module, _CutPoints | None] = WeakKeyDictionary()


def reads_first_token(model: nn.Module, batch: Mapping[str, Tensor]) -> bool:
    """Tell whether passes of this model can be cut; arguments as of `check_first_token`."""
    return _places_of(model, batch) is not None


def check_first_token(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    """Refuse a model whose passes cannot be cut.

    Args:
        model: Left as it is.
        batch: What it is called with; a row is enough.

    Raises:
        ConfigError: The classifier reads other tokens, or the last block cannot be cut.
    """
    if not reads_first_token(model, batch):
        raise ConfigError(
            "training.cls-only needs an encoder that normalises after each residual sum, "
            "and a classifier that reads its first token alone, as BERT's do; "
            f"{type(model).__name__} is no such model: leave the key out, or set it to false."
        )


@contextmanager
def first_token_only(model: nn.Module, batch: Mapping[str, Tensor]) -> Iterator[None]:
    """Compute of the last block, within this context, the part that the first token needs.

    Args:
        model: In training or evaluation mode.
        batch: What it is called with, to try it on; a row is enough.

    Raises:
        ConfigError: See `check_first_token`.
    """
    check_first_token(model, batch)
    places = _known[model]
    assert places is not None
    with _cut(places):
        yield


def _places_of(model: nn.Module, batch: Mapping[str, Tensor]) -> _CutPoints | None:
    """Return the result of `_find` for this model, computed once."""
    if model not in _known:
        _known[model] = _find(model, batch)
    return _known[model]


@contextmanager
def _cut(places: _CutPoints) -> Iterator[None]:
    """Give these modules the first token alone.

    Where the output projection gives one token, the residual sum repeats it for all, and the norm
    is given the first of the sum.
    """
    with ExitStack() as stack:
        for place in places.after:
            stack.enter_context(place.register_forward_pre_hook(keep_first_token))
        if places.attention is not None:
            stack.enter_context(first_query(places.attention))
        yield


@torch.no_grad()
def _find(model: nn.Module, batch: Mapping[str, Tensor]) -> _CutPoints | None:
    """Find the places in the last block; None where cutting there changes logits."""
    found = {
        position.role: position
        for position in find_target_modules(model)
        if position.role in (*_PROJECTIONS, *_AFTER) and position.kind != "block"
    }
    if not {*_AFTER} <= {*found} or any(p.stack != "encoder" for p in found.values()):
        return None
    after = tuple(model.get_submodule(found[role].name) for role in _AFTER)
    norm = found["attention-norm"]
    block = model.get_submodule(block_of(norm.name, norm.layer))
    mode = model.training
    model.eval()
    try:
        with block.register_forward_hook(_nan_beyond_first):
            logits = model(**batch).logits
        whole = _output(model, block, batch)
        if whole is None or not bool(logits.isfinite().all()):
            return None
        for places in (_CutPoints(after, _attention(model, found)), _CutPoints(after)):
            if _gives(whole[:, :1], places, model, block, batch):
                return places
        return None
    finally:
        model.train(mode)


def _attention(model: nn.Module, found: Mapping[str, Position]) -> Attention | None:
    """Return the attention of the last block, where its first query can be computed alone."""
    if not {*_PROJECTIONS} <= {*found}:
        return None
    module = model.get_submodule(found["query"].name.rpartition(".")[0])
    if not asks_queries_apart(module):
        return None
    roles = (*_PROJECTIONS, "attention-output")
    return Attention(module, *(model.get_submodule(found[role].name) for role in roles))


def _gives(
    whole: Tensor,
    places: _CutPoints,
    model: nn.Module,
    block: nn.Module,
    batch: Mapping[str, Tensor],
) -> bool:
    """Tell whether the block, cut there, gives this."""
    try:
        with _cut(places):
            cut = _output(model, block, batch)
    except (RuntimeError, ValueError, IndexError):
        return False  # a block that cannot be cut says so by a shape that does not fit
    if cut is None or cut.shape != whole.shape:
        return False
    return bool((cut - whole).norm() <= _CLOSENESS * whole.norm())


def _output(model: nn.Module, block: nn.Module, batch: Mapping[str, Tensor]) -> Tensor | None:
    """Return the output of a block when the model is called; None where it is not called."""
    seen: list[Tensor] = []
    with block.register_forward_hook(lambda _, __, out: seen.append(_hidden(out))):
        model(**batch)
    return seen[-1] if seen else None


def _hidden(output: Any) -> Tensor:
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, Tensor)
    return hidden


def _nan_beyond_first(module: nn.Module, args: Any, output: Any) -> Any:
    hidden = _hidden(output).clone()
    hidden[:, 1:] = torch.nan
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
