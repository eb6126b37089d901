"""Compute the blocks of a model for the tokens of a batch's texts, and not for its padding.

In:  a model that attends by the sdpa function of `transformers`, and padded batches.
Out: passes whose blocks see the texts end to end, as one row without padding.

Nine tenths of a pass are products, norms and activations of single tokens, which need no rows. So
the input of the first block, (rows, longest, width), is gathered to (1, tokens, width), and laid
out in rows again after the last; attention alone goes text by text. Which texts share a step stays,
and so does the model around the blocks: logits and gradients are those of the padded batch up to
the order in which sums are rounded.

A model qualifies by a test, run once: packed and padded logits of a padded batch are compared.
Others are called with padding, and so is every model on a GPU, where one padded attention is
quicker than many short ones.

Source: ours, after padding-free passes over FlashAttention's variable lengths.
"""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from fedpet.backbone.device import device_of
from fedpet.backbone.module_roles import block_of, find_target_modules
from fedpet.pet.layers.flat_parameters import trainables_of
from fedpet.training.batching import inputs_of

if TYPE_CHECKING:
    from fedpet.data import Rows

__all__ = ["packed_tokens"]

_NAME = "fedpet-packed"  # of `_attend` among transformers' attentions


@dataclass
class _Texts(threading.local):
    """Hold the places of a batch's texts, by thread; empty where none is padded."""

    runs: list[tuple[int, int]] = field(default_factory=list)  # (texts, tokens of each) in order
    shape: tuple[int, int] = (0, 0)  # rows, longest
    places: Tensor | None = None  # (tokens,), into rows laid end to end
    inside: tuple[Tensor, bool] | None = None  # a mask, and that it hides nothing within a text


@dataclass(frozen=True)
class _Blocks:
    """The modules at which a model is packed."""

    blocks: list[nn.Module]
    attentions: list[list[nn.Module]]  # by block
    config: Any  # of the attentions, naming `_attend`


_known: WeakKeyDictionary[nn.Module, _Blocks | None] = WeakKeyDictionary()
_texts_of: WeakKeyDictionary[nn.Module, _Texts] = WeakKeyDictionary()  # by attention


def packed_tokens(
    model: nn.Module, rows: Rows, *, last_block: bool = True
) -> AbstractContextManager[None]:
    """Return a context that leaves padding out of this model's blocks, where that can be done.

    Args:
        model: In training or evaluation mode.
        rows: What it is called with, to try it on.
        last_block: False leaves the last block as it is, for `cls_only`.
    """
    found = _places_of(model, rows)
    if found is None:
        return nullcontext()
    return _packed(model, found, len(found.blocks) - (not last_block))


def _places_of(model: nn.Module, rows: Rows) -> _Blocks | None:
    """Return the result of `_find` for this model, computed once."""
    if model not in _known:
        lengths = np.diff(rows.offsets)
        pair = np.asarray([np.argmin(lengths), np.argmax(lengths)])
        if lengths[pair[0]] == lengths[pair[1]]:
            return None  # without padding there is nothing to leave out, and nothing to try
        _known[model] = _find(model, inputs_of(rows, pair, device_of(model))[0])
    return _known[model]


@contextmanager
def _packed(model: nn.Module, found: _Blocks, count: int) -> Iterator[None]:
    """Pack the first `count` blocks."""
    if not count:
        yield
        return
    texts = _Texts()
    with ExitStack() as stack:
        for module in (a for attentions in found.attentions[:count] for a in attentions):
            stack.callback(setattr, module, "config", module.config)
            module.config = found.config
            _texts_of[module] = texts
            stack.callback(_texts_of.pop, module)
        packer = _Packer(texts)
        stack.enter_context(model.register_forward_pre_hook(packer.note, with_kwargs=True))
        for block in found.blocks[:count]:
            stack.enter_context(block.register_forward_pre_hook(packer.enter, with_kwargs=True))
        stack.enter_context(found.blocks[count - 1].register_forward_hook(packer.leave))
        yield


class _Packer:
    """Hooks: note a batch's texts, pack them before the first block, lay them out after the last.

    A later block finds its tokens packed, and packs what else is given to it (rotary positions).
    """

    def __init__(self, texts: _Texts) -> None:
        self._texts = texts

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        texts, mask = self._texts, kwargs.get("attention_mask")
        texts.places = texts.inside = None
        if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.device.type != "cpu":
            return
        there = mask != 0
        lengths = there.sum(1)
        longest = mask.shape[1]
        filled_right = torch.arange(longest) < lengths[:, None]
        if bool(there.all()) or not bool(lengths.all()) or not torch.equal(there, filled_right):
            return
        texts.runs = [(len([*run]), n) for n, run in itertools.groupby(lengths.tolist())]
        texts.shape = mask.shape[0], longest
        texts.places = there.flatten().nonzero().flatten()

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._texts.places is None:
            return None
        return (
            tuple(self._pack(value) for value in args),
            {name: self._pack(value) for name, value in kwargs.items()},
        )

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._texts.places is None:
            return None
        if isinstance(output, tuple):
            return (self._lay_out(output[0]), *output[1:])
        return self._lay_out(output)

    def _pack(self, value: Any) -> Any:
        """Gather (rows or 1, longest) and (rows or 1, longest, width); leave what is none."""
        if isinstance(value, tuple):
            return tuple(self._pack(part) for part in value)
        rows, longest = self._texts.shape
        if not isinstance(value, Tensor) or value.dim() not in (2, 3):
            return value
        if value.shape[0] not in (1, rows) or value.shape[1] != longest:
            return value
        flat = value.expand(rows, *value.shape[1:]).flatten(0, 1)
        return _Gather.apply(flat, self._texts.places)[None]  # type: ignore[no-untyped-call]

    def _lay_out(self, hidden: Tensor) -> Tensor:
        rows, longest = self._texts.shape
        out = _Spread.apply(hidden[0], self._texts.places, rows * longest)  # type: ignore[no-untyped-call]
        return out.unflatten(0, (rows, longest))  # type: ignore[no-any-return]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flat: Tensor, places: Tensor) -> Tensor:
        ctx.places, ctx.size = places, len(flat)
        return flat.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _Spread.apply(g, ctx.places, ctx.size), None  # type: ignore[no-untyped-call]


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, places: Tensor, size: int) -> Tensor:
        ctx.places = places
        return packed.new_zeros(size, *packed.shape[1:]).index_copy_(0, places, packed)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return _Gather.apply(g, ctx.places), None, None  # type: ignore[no-untyped-call]


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute `transformers`' sdpa attention of each text, neighbours of one length together.

    Args:
        module: The attention.
        query: (1, heads, tokens, size), texts end to end; those of a batch without padding in rows.
        key: As query; value too.
        value: As query.
        attention_mask: (rows, 1, longest, longest), of the padded batch; None hides no token.
        options: Handed on.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    texts = _texts_of[module]
    if texts.places is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if attention_mask is not None and _hides_padding_alone(texts, attention_mask):
        attention_mask = None
    sizes = [count * n for count, n in texts.runs]
    parts = zip(*(x[0].split(sizes, dim=1) for x in (query, key, value)), strict=True)
    outputs, first = [], 0
    for (count, n), part in zip(texts.runs, parts, strict=True):
        q, k, v = (x.unflatten(1, (count, n)).transpose(0, 1) for x in part)
        mask = None if attention_mask is None else attention_mask[first : first + count, :, :n, :n]
        outputs.append(sdpa_attention_forward(module, q, k, v, mask, **options)[0].flatten(0, 1))
        first += count
    return torch.cat(outputs)[None], None


def _hides_padding_alone(texts: _Texts, mask: Tensor) -> bool:
    """Tell whether each text sees all of itself; looked up once a pass."""
    known = texts.inside
    if known is None or known[0] is not mask:
        seen = mask if mask.dtype == torch.bool else mask == 0
        rows = [n for count, n in texts.runs for _ in range(count)]
        whole = all(bool(seen[row, :, :n, :n].all()) for row, n in enumerate(rows))
        texts.inside = known = (mask, whole)
    return known[1]


def _find(model: nn.Module, batch: Mapping[str, Tensor]) -> _Blocks | None:
    """Find the blocks; None where packing them changes logits or gradients.

    Gradients are compared because a module that begins at zero has no share in the logits yet.
    """
    if device_of(model).type != "cpu" or "attention_mask" not in batch:
        return None
    found = _blocks(model)
    if found is None:
        return None
    mode = model.training
    model.eval()
    try:
        padded = _outcome(model, batch)
        with _packed(model, found, len(found.blocks)):
            packed = _outcome(model, batch)
    except Exception:  # whatever a model raises that is not made of rows
        return None
    finally:
        model.train(mode)
    alike = all(_is_close(a, b) for a, b in zip(packed, padded, strict=True))
    return found if alike else None


def _blocks(model: nn.Module) -> _Blocks | None:
    """Return the repeated blocks that attend by `transformers`' sdpa; None without them."""
    from transformers import AttentionInterface

    inner = [position for position in find_target_modules(model) if position.layer is not None]
    names = dict.fromkeys(block_of(position.name, position.layer) for position in inner)
    blocks = [model.get_submodule(name) for name in names]
    attentions = [[m for m in block.modules() if _names_sdpa(m)] for block in blocks]
    if len({position.stack for position in inner}) != 1 or not all(attentions):
        return None
    config = copy.copy(cast(Any, attentions[0][0]).config)
    config._attn_implementation = _NAME
    AttentionInterface.register(_NAME, _attend)
    return _Blocks(blocks, attentions, config)


def _names_sdpa(module: nn.Module) -> bool:
    return getattr(getattr(module, "config", None), "_attn_implementation", None) == "sdpa"


def _outcome(model: nn.Module, batch: Mapping[str, Tensor]) -> list[Tensor]:
    """Return logits, and the gradient of each trainable of a loss in which each of them counts."""
    trained = trainables_of(model)
    before = [None if p.grad is None else p.grad.clone() for p in trained]
    with torch.inference_mode(False), torch.enable_grad():
        for parameter in trained:
            parameter.grad = None
        logits = model(**batch).logits
        if trained:
            weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype) + 1.5
            (logits * weights.view_as(logits)).sum().backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained]
    for parameter, gradient in zip(trained, before, strict=True):
        parameter.grad = gradient
    return [logits.detach(), *gradients]


def _is_close(found: Tensor, expected: Tensor) -> bool:
    """Compare by norm; a wrong pass differs by about 1."""
    if found.shape != expected.shape or not bool(expected.isfinite().all()):
        return False
    tolerance = max(1e-3, 8 * torch.finfo(expected.dtype).eps)
    return bool((found - expected).norm() <= tolerance * expected.norm() + 1e-6)
