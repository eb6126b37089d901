"""Compute attention for the query of the first token alone.

In:  the attention of a block, its query, key and value projections.
Out: the attention of the first token, repeated for all as a view.

The query of the other tokens is not computed. Nor are keys and values, where nothing but a mask,
a bias or a low-rank branch acts on their projections K and V: the score of a token x is
q . (K x + b) = (K^T q) . x + q . b, whose last term is the same for all tokens, so that softmax
cancels it; and the mean of V x + b over tokens, weighted to 1, is V times the mean of x, plus b.
One vector a text and head is multiplied with each, instead of one a token.

It serves attention that is the sdpa function of `transformers`, and MPNet's own with its bias of
relative positions; `fedpet/training/cls_only.py` tests that a model's attention does nothing else.

Source: ours.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fedpet.pet.layers.per_head_linear import PerHeadLinear, by_heads

__all__ = ["Attention", "asks_queries_apart", "first_query", "keep_first_token"]

_NAME = "fedpet-first-query"  # of `_attend` among transformers' attentions


@dataclass(frozen=True)
class Attention:
    """The attention of a block, and its projections."""

    module: nn.Module
    query: nn.Module
    key: nn.Module
    value: nn.Module
    output: nn.Module

    @cached_property
    def config(self) -> Any:
        """A copy of the module's config that names `_attend`."""
        config: Any = copy.deepcopy(self.module.config)
        config._attn_implementation = _NAME
        return config


@dataclass(frozen=True)
class _Folded:
    """The projections of keys and values that are not made."""

    key: PerHeadLinear
    value: PerHeadLinear

    def attend(
        self, x: Tensor, query: Tensor, bias: Tensor | None, scaling: float | None = None
    ) -> Tensor:
        """Compute attention of one query a text over the tokens themselves.

        Args:
            x: The tokens, (rows, tokens, in).
            query: (rows, heads, size).
            bias: Added to the scores, (rows or 1, heads or 1, 1, tokens); or None.
            scaling: Of the scores; None for one over the root of the size.

        Returns:
            (rows, heads, size).
        """
        x = x[:, None]
        looked_for = self.key.to_inputs(query.transpose(0, 1)).transpose(0, 1)  # (rows, heads, in)
        mean = nn.functional.scaled_dot_product_attention(  # of all heads of a text as one
            looked_for[:, None],
            x,
            x,
            attn_mask=None if bias is None else bias.transpose(1, 2),
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        )
        found = self.value.to_outputs(mean[:, 0].transpose(0, 1)).transpose(0, 1)
        of_value = self.value.bias()
        return found if of_value is None else found + of_value.view(found.shape[1:])


def asks_queries_apart(module: nn.Module) -> bool:
    """Tell whether attention of the first query alone can be computed for this module."""
    return _is_sdpa(module) or _is_biased(module)


def _is_sdpa(module: nn.Module) -> bool:
    """Tell whether it calls the function that its config names, and that is sdpa."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None) == "sdpa"


def _is_biased(module: nn.Module) -> bool:
    """Tell whether it takes the bias of each pair of positions, as MPNet's does."""
    names = inspect.signature(type(module).forward).parameters
    return {"hidden_states", "attention_mask", "position_bias"} <= {*names}


@contextmanager
def first_query(attention: Attention) -> Iterator[None]:
    """Replace this attention, within the context, by that of the first token for all."""
    query, folded = _BroadcastFirst(), _fold(attention)
    with ExitStack() as stack:
        stack.enter_context(attention.query.register_forward_pre_hook(query.before))
        stack.enter_context(attention.query.register_forward_hook(query.after))
        if _is_sdpa(attention.module):
            stack.enter_context(_through_transformers(attention, folded))
        elif folded is not None:
            forward = partial(_attend_with_bias, attention, folded)
            stack.enter_context(_computed_by(attention.module, forward))
        yield


def keep_first_token(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Leave of (rows, tokens, ...) the first token: a forward pre-hook."""
    return (args[0][:, :1].contiguous(), *args[1:])  # a view would hold all tokens in memory


class _BroadcastFirst(threading.local):
    """A projection of the first token, repeated for all; each thread has its own pass."""

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        self._tokens = args[0].shape[1]
        return keep_first_token(module, args)

    def after(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.expand(-1, self._tokens, -1)


def _fold(attention: Attention) -> _Folded | None:
    """Fold keys and values into their projections; None where they must be made.

    Dropped weights do not add up to 1, and half precision is left to torch.
    """
    key, value = by_heads(attention.key), by_heads(attention.value)
    if key is None or value is None or key.weight.shape != value.weight.shape:
        return None
    half = key.weight.dtype.itemsize < 4 or torch.is_autocast_enabled(key.weight.device.type)
    if attention.module.training or half:
        return None
    return _Folded(key, value)


@contextmanager
def _computed_by(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _attend_with_bias(
    attention: Attention,
    folded: _Folded,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor]:
    """Compute the output for the first token, in an attention that takes a bias.

    Args:
        attention: With its projections.
        folded: Its keys and values.
        hidden_states: The tokens, (rows, tokens, in).
        attention_mask: (rows, 1, tokens or 1, tokens), added to the scores; None hides no token.
        position_bias: (rows, heads, tokens, tokens), the same.
        options: Of outputs that training does not ask for.
    """
    assert position_bias is not None
    bias = position_bias[:, :, :1]
    if attention_mask is not None:
        bias = bias + attention_mask[:, :, :1]
    query = attention.query(hidden_states)[:, 0].unflatten(1, (bias.shape[1], -1))
    found = folded.attend(hidden_states, query, bias)
    return (attention.output(found.flatten(1)[:, None]),)


class _Tokens(threading.local):
    """Stands for keys and values: the tokens that they would be made of, by thread."""

    def __init__(self, folded: _Folded) -> None:
        self.folded = folded
        self._tokens: Tensor | None = None

    def stand_in(self, x: Tensor) -> Tensor:
        """Remember the tokens, and return zeros of the keys' shape, which take no memory."""
        self._tokens = x
        return x.new_zeros(()).expand(*x.shape[:-1], len(self.folded.key.weight))

    def taken(self) -> Tensor:
        """Return the tokens, once."""
        x, self._tokens = self._tokens, None
        assert x is not None
        return x


_not_made: WeakKeyDictionary[nn.Module, _Tokens] = WeakKeyDictionary()


@contextmanager
def _through_transformers(attention: Attention, folded: _Folded | None) -> Iterator[None]:
    """Name `_attend` in the attention's config."""
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _attend)
    module = cast(Any, attention.module)
    with ExitStack() as stack:
        stack.callback(setattr, module, "config", module.config)
        module.config = attention.config
        if folded is not None:
            tokens = _not_made[module] = _Tokens(folded)
            stack.callback(_not_made.pop, module)
            for projection in (attention.key, attention.value):
                stack.enter_context(_computed_by(projection, tokens.stand_in))
        yield


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute `transformers`' sdpa attention of the first query, and repeat it for all.

    Args:
        module: The attention.
        query: (rows, heads, tokens, size), the same for all tokens.
        key: As query; value too.
        value: Of all tokens.
        attention_mask: (rows, 1, tokens or 1, tokens); None hides no token.
        options: Handed on.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    length = query.shape[2]
    if attention_mask is not None:
        attention_mask = attention_mask[:, :, :1]
    tokens = _not_made.get(module)
    if tokens is None:
        first, weights = sdpa_attention_forward(
            module, query[:, :, :1], key, value, attention_mask, **options
        )
        return first.expand(-1, length, -1, -1), weights
    scaling = options.get("scaling")
    first = tokens.folded.attend(tokens.taken(), query[:, :, 0], attention_mask, scaling)
    return first[:, None].expand(-1, length, -1, -1), None
