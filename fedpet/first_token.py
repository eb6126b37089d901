"""Training passes that leave out what the classifier never reads.

    ... -> model -> [training] -> client -> ...

In:  an encoder whose classifier reads its first token ([CLS], <s>) and no other.
Out: passes whose last block computes everything after its attention for that token alone.

The last attention needs all tokens as keys and values, but the query of the first one alone; what
follows it (its output projection, norm, feed-forward part, norm) acts on each token by itself, and
of all but the first nobody asks. Ten of the twelve parts of a block's matrix products fall away,
forward and backward, and nearly all of its attention: an eighth of a step in six blocks, more where
texts are long. Logits and gradients are the same up to the order in which sums are rounded.

The block goes on as if it had all tokens: the query of the first is repeated for all, without a
copy, and so is what attention makes of it. That is done where attention is the sdpa function of
`transformers`; in models that compute it themselves (MPNet, DeBERTa) the queries stay whole.

Whether a model is of that kind is not looked up but tried, once a model: what the last block gives
for the other tokens is replaced by NaN, which reaches the logits wherever anything reads it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fedpet.errors import ConfigError
from fedpet.positions import Position, find_positions

__all__ = ["check_first_token", "first_token_only"]

_CLOSENESS = 1e-3  # of the block's outputs for the first token, relative; wrong ones differ by 1
_FIRST_QUERY = "fedpet-first-query"  # the name of `_first_query` among transformers' attentions


@dataclass(frozen=True)
class _Places:
    """Where the last block of a model is cut."""

    after: tuple[nn.Module, ...]  # the last attention's output projection and norm
    attention: nn.Module | None = None  # itself, which calls the function its config names
    query: nn.Module | None = None  # its query projection


_known: WeakKeyDictionary[nn.Module, _Places | None] = WeakKeyDictionary()


def check_first_token(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    """Refuse a model whose passes cannot be cut.

    Args:
        model: Left as it is.
        batch: What it is called with; a row is enough.

    Raises:
        ConfigError: The classifier reads other tokens, or the last block cannot be cut.
    """
    if _places_of(model, batch) is None:
        raise ConfigError(
            "training.first-token-only needs an encoder that normalises after each residual sum, "
            "and a classifier that reads its first token alone, as BERT's do; "
            f"{type(model).__name__} is no such model: leave the key out."
        )


@contextmanager
def first_token_only(model: nn.Module, batch: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it, passes compute of the last block what the first token needs.

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


def _places_of(model: nn.Module, batch: Mapping[str, Tensor]) -> _Places | None:
    """What `_find` found for this model, once."""
    if model not in _known:
        _known[model] = _find(model, batch)
    return _known[model]


@contextmanager
def _cut(places: _Places) -> Iterator[None]:
    """These modules see the first token alone.

    Where the output projection gives one token, the residual sum repeats it for all, and the norm
    is given the first of the sum.
    """
    with ExitStack() as stack:
        for place in places.after:
            stack.enter_context(place.register_forward_pre_hook(_first_of_all))
        if places.query is not None:
            query, attention = _FirstRepeated(), cast(Any, places.attention)
            stack.enter_context(places.query.register_forward_pre_hook(query.before))
            stack.enter_context(places.query.register_forward_hook(query.after))
            stack.callback(setattr, attention, "config", attention.config)
            attention.config = copy.deepcopy(attention.config)
            attention.config._attn_implementation = _FIRST_QUERY
        yield


def _first_of_all(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0][:, :1].contiguous(), *args[1:])  # a view would hold all tokens in memory


class _FirstRepeated:
    """A projection of the first token, given out for all."""

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        self._tokens = args[0].shape[1]
        return _first_of_all(module, args)

    def after(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.expand(-1, self._tokens, -1)


def _first_query(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """`transformers`' sdpa attention of the first query, given out for all.

    Args:
        module: The attention.
        query: (rows, heads, tokens, size), the same for all tokens.
        key: As query; value too.
        value: Of all tokens.
        attention_mask: (rows, 1, tokens or 1, tokens); None hides no token.
        options: Handed on.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is not None:
        attention_mask = attention_mask[:, :, :1]
    first, weights = sdpa_attention_forward(
        module, query[:, :, :1], key, value, attention_mask, **options
    )
    return first.expand(-1, query.shape[2], -1, -1), weights


@torch.no_grad()
def _find(model: nn.Module, batch: Mapping[str, Tensor]) -> _Places | None:
    """The places in the last block; None where cutting there changes logits."""
    roles = ("query", "attention-output", "attention-norm")
    found = {
        position.role: position
        for position in find_positions(model)
        if position.role in roles and position.kind != "block"
    }
    if not {*roles[1:]} <= {*found} or any(p.stack != "encoder" for p in found.values()):
        return None
    after = tuple(model.get_submodule(found[role].name) for role in roles[1:])
    norm = found["attention-norm"]
    block = model.get_submodule(_block_of(norm.name, norm.layer))
    mode = model.training
    model.eval()
    try:
        with block.register_forward_hook(_nan_beyond_first):
            logits = model(**batch).logits
        whole = _output(model, block, batch)
        if whole is None or not bool(logits.isfinite().all()):
            return None
        for places in (*_with_query(model, after, found), _Places(after)):
            if _gives(whole[:, :1], places, model, block, batch):
                return places
        return None
    finally:
        model.train(mode)


def _with_query(
    model: nn.Module, after: tuple[nn.Module, ...], found: Mapping[str, Position]
) -> Iterator[_Places]:
    """The places with the query's, where attention runs by sdpa."""
    if "query" in found:
        name = found["query"].name
        attention: Any = model.get_submodule(name.rpartition(".")[0])
        if getattr(getattr(attention, "config", None), "_attn_implementation", None) == "sdpa":
            from transformers import AttentionInterface

            AttentionInterface.register(_FIRST_QUERY, _first_query)
            yield _Places(after, attention, model.get_submodule(name))


def _gives(
    whole: Tensor, places: _Places, model: nn.Module, block: nn.Module, batch: Mapping[str, Tensor]
) -> bool:
    """Whether the block, cut there, gives this."""
    try:
        with _cut(places):
            cut = _output(model, block, batch)
    except (RuntimeError, ValueError, IndexError):
        return False  # a block that cannot be cut says so by a shape that does not fit
    if cut is None or cut.shape != whole.shape:
        return False
    return bool((cut - whole).norm() <= _CLOSENESS * whole.norm())


def _block_of(name: str, layer: int | None) -> str:
    """`a.layer.5` of `a.layer.5.attention.norm`: up to the number of the layer."""
    parts = name.split(".")
    return ".".join(parts[: parts.index(str(layer)) + 1])


def _output(model: nn.Module, block: nn.Module, batch: Mapping[str, Tensor]) -> Tensor | None:
    """What a block gives when the model is called; None where it is not called."""
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
