"""An attention of which only the first token's query is asked.

    ... -> model -> [training] -> client -> ...

In:  the attention of a block, its query, key and value projections.
Out: what attention makes of the first token, given out for all: a view, not a copy.

The query of the other tokens is not computed. Nor are keys and values, where nothing but a mask,
a bias or a low-rank branch acts on their projections K and V: the score of a token x is
q . (K x + b) = (K^T q) . x + q . b, of which the last is the same for all tokens and falls out of
the softmax; and the mean of V x + b over tokens, weighted to 1, is V times the mean of x, plus b.
One vector a text and head is multiplied with each, instead of one a token.

Only where attention is the sdpa function of `transformers`; `fedpet/first_token.py` tries whether a
model's attention does nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fedpet.modules.by_heads import ByHeads, by_heads

__all__ = ["Attention", "attends_by_sdpa", "first_query"]

_NAME = "fedpet-first-query"  # of `_attend` among transformers' attentions


@dataclass(frozen=True)
class Attention:
    """The attention of a block, and its projections."""

    module: nn.Module  # calls the function that its config names
    query: nn.Module
    key: nn.Module
    value: nn.Module


class _Folded:
    """Keys and values that are not made: of these tokens, by these projections."""

    def __init__(self, key: ByHeads, value: ByHeads) -> None:
        self.key = key
        self.value = value
        self.tokens: Tensor | None = None

    def stand_in(self, x: Tensor) -> Tensor:
        """Zeros of the shape of the keys, which take no memory; the tokens are remembered."""
        self.tokens = x
        return x.new_zeros(()).expand(*x.shape[:-1], len(self.key.weight))


_folded: WeakKeyDictionary[nn.Module, _Folded] = WeakKeyDictionary()


def attends_by_sdpa(module: nn.Module) -> bool:
    """Whether an attention calls the function that its config names, and that is sdpa."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None) == "sdpa"


@contextmanager
def first_query(attention: Attention) -> Iterator[None]:
    """Within it, this attention is that of the first token for all."""
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _attend)
    with ExitStack() as stack:
        query, module = _FirstRepeated(), cast(Any, attention.module)
        stack.enter_context(attention.query.register_forward_pre_hook(query.before))
        stack.enter_context(attention.query.register_forward_hook(query.after))
        stack.callback(setattr, module, "config", module.config)
        module.config = copy.deepcopy(module.config)
        module.config._attn_implementation = _NAME
        folded = _fold(attention)
        if folded is not None:
            _folded[module] = folded
            stack.callback(_folded.pop, module)
            for projection in (attention.key, attention.value):
                stack.enter_context(_computed_by(projection, folded.stand_in))
        yield


def first_of_all(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A forward pre-hook that leaves of (rows, tokens, ...) the first token."""
    return (args[0][:, :1].contiguous(), *args[1:])  # a view would hold all tokens in memory


class _FirstRepeated:
    """A projection of the first token, given out for all."""

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        self._tokens = args[0].shape[1]
        return first_of_all(module, args)

    def after(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.expand(-1, self._tokens, -1)


def _fold(attention: Attention) -> _Folded | None:
    """What keys and values are replaced by; None where they must be made.

    Dropped weights do not add up to 1, and half precision is left to torch.
    """
    key, value = by_heads(attention.key), by_heads(attention.value)
    if key is None or value is None or key.weight.shape != value.weight.shape:
        return None
    if attention.module.training or torch.is_autocast_enabled(key.weight.device.type):
        return None
    return _Folded(key, value)


@contextmanager
def _computed_by(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _attend(
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

    tokens = query.shape[2]
    if attention_mask is not None:
        attention_mask = attention_mask[:, :, :1]
    folded = _folded.get(module)
    if folded is None:
        first, weights = sdpa_attention_forward(
            module, query[:, :, :1], key, value, attention_mask, **options
        )
        return first.expand(-1, tokens, -1, -1), weights
    first = _attend_to_tokens(folded, query[:, :, 0], attention_mask, options.get("scaling"))
    return first[:, None].expand(-1, tokens, -1, -1), None


def _attend_to_tokens(
    folded: _Folded, query: Tensor, attention_mask: Tensor | None, scaling: float | None
) -> Tensor:
    """Attention of one query a text over the tokens themselves.

    Args:
        folded: The tokens, (rows, tokens, in), and the projections.
        query: (rows, heads, size).
        attention_mask: (rows, 1, 1, tokens), or None.
        scaling: Of the scores; None for one over the root of the size.

    Returns:
        (rows, heads, size).
    """
    x = folded.tokens
    assert x is not None
    folded.tokens = None
    x = x[:, None]
    looked_for = folded.key.to_inputs(query.transpose(0, 1))  # (heads, rows, in)
    mean = nn.functional.scaled_dot_product_attention(  # (rows, 1, heads, in)
        looked_for.transpose(0, 1)[:, None],
        x,
        x,
        attn_mask=attention_mask,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
    )
    found = folded.value.to_outputs(mean[:, 0].transpose(0, 1)).transpose(0, 1)
    bias = folded.value.bias()
    return found if bias is None else found + bias.view(found.shape[1:])
