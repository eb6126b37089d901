"""Compute a language model's cross-entropy where labels are, a chunk of the logits at a time.

In:  a model with an output layer over the vocabulary, a batch, its labels: (rows, tokens), -100
     for a token that is none.
Out: the mean over the label tokens, to be differentiated; or sums by row, for an evaluation.

The model is called as it is, but its output layer is shown one position a row: what it would have
read is taken at its door, and of that the positions that predict a label go through the layer, so
many at a time that their logits take `CHUNK_BYTES`. Where the layer is frozen, as it is under a
mask, a chunk's gradient is taken at once and its logits are dropped: no product is done twice, and
the logits of all tokens (float32, 201 MB for 1,024 tokens of 49,152) never exist. Where the layer
is trained, chunks are recomputed in the backward pass.

The shift happens here, once: the state at position t predicts the token at t + 1. Padding is never
a label, so it is left out whatever its token is.

Law: equal to the loss that transformers computes from `labels=`, up to rounding.

A model that does more to its logits after the layer (Gemma 2 caps them) is known by a test, run
once; its logits are then computed whole.

Source: ours; the gradient within the forward pass as in Liger Kernel (Hsu et al., 2024,
arXiv:2410.10989).
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from fedpet.data.rows import NO_LABEL

__all__ = ["CHUNK_BYTES", "row_sums", "token_loss"]

CHUNK_BYTES = 1 << 25  # of float32 logits that exist at a time

_reads_states: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def token_loss(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    labels: Tensor,
    *,
    shift: bool = True,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Return the mean cross-entropy of the label tokens: a scalar, float32.

    Args:
        model: Of transformers, with an output layer over the vocabulary.
        inputs: A batch; its "input_ids" are (rows, tokens).
        labels: (rows, tokens), -100 for a token that is none.
        shift: A state predicts the next token. False: the token at its own position, as in a
            decoder whose inputs are shifted already.
        chunk_bytes: Of the logits that exist at a time.
    """
    found = _find(model, inputs, labels, shift)
    if not len(found.targets):
        return found.states.sum() * 0.0
    return _sum(found, chunk_bytes) / len(found.targets)


@torch.no_grad()
def row_sums(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    labels: Tensor,
    *,
    shift: bool = True,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Return for each row the sum of its tokens' losses, and how many are predicted: (rows, 2).

    Float64, see `token_loss` for the arguments. A token is predicted where its logit is largest.
    """
    found = _find(model, inputs, labels, shift)
    sums = torch.zeros(len(labels), 2, dtype=torch.float64, device=labels.device)
    for part in _chunks(found, chunk_bytes):
        logits, targets = found.logits_of(found.states[part]), found.targets[part]
        each = cross_entropy(logits, targets, reduction="none")
        hits = logits.argmax(-1) == targets
        sums.index_add_(0, found.rows[part], torch.stack([each, hits], 1).double())
    return sums


@dataclass(frozen=True)
class _LabelStates:
    """Hold the states that predict the labels of a batch.

    Attributes:
        states: What the output layer reads, (labels, width); or logits, where `head` is None.
        targets: int64 (labels,).
        rows: The row of each, int64 (labels,).
        head: The output layer.
        width: Of the vocabulary.
    """

    states: Tensor
    targets: Tensor
    rows: Tensor
    head: nn.Module | None
    width: int

    def logits_of(self, states: Tensor) -> Tensor:
        logits: Tensor = states if self.head is None else self.head(states)
        return logits.float()


def _find(
    model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor, shift: bool
) -> _LabelStates:
    """Run the model, and pick the states that predict a label."""
    states, logits, head = _run(model, inputs)
    if shift:
        states, labels = states[:, :-1], labels[:, 1:]
    chosen = labels != NO_LABEL
    width = logits.shape[-1]
    return _LabelStates(states[chosen], labels[chosen], chosen.nonzero()[:, 0], head, width)


def _run(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, nn.Module | None]:
    """Return the states before the output layer, some logits, and the layer.

    The layer is None, and the states are all logits, where the layer is not the last of it.
    """
    call: dict[str, Any] = dict(inputs)
    if "use_cache" in inspect.signature(model.forward).parameters:
        call["use_cache"] = False  # of keys and values, for generation
    whole: Any = model
    head = whole.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None or not _reads_states.get(model, True):
        logits = model(**call).logits
        return logits, logits, None
    seen: list[Tensor] = []
    thread = threading.get_ident()  # others may run the model at the same time

    def first_alone(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if threading.get_ident() != thread:
            return None
        seen.append(args[0])
        return (_first_of_each(args[0]), *args[1:])

    with head.register_forward_pre_hook(first_alone):
        logits = model(**call).logits
    if model not in _reads_states:
        one = head(_first_of_each(seen[-1]))
        same = len(seen) == 1 and one.shape == logits.shape
        _reads_states[model] = same and torch.allclose(one, logits, equal_nan=True)
        if not _reads_states[model]:
            return _run(model, inputs)
    return seen[-1], logits, head


def _first_of_each(states: Tensor) -> Tensor:
    """Take one position a row: contiguous, since torch copies the whole weight a row otherwise."""
    return states[:, :1].contiguous()


def _chunks(found: _LabelStates, chunk_bytes: int) -> Iterator[slice]:
    size = max(1, chunk_bytes // (4 * found.width))
    for start in range(0, len(found.targets), size):
        yield slice(start, start + size)


def _sum(found: _LabelStates, chunk_bytes: int) -> Tensor:
    """Add up the losses of all label tokens."""
    parts = list(_chunks(found, chunk_bytes))

    def loss_of(states: Tensor, part: slice) -> Tensor:
        return cross_entropy(found.logits_of(states), found.targets[part], reduction="sum")

    if len(parts) == 1 or not torch.is_grad_enabled():
        return torch.stack([loss_of(found.states[part], part) for part in parts]).sum()
    if found.head is not None and not any(p.requires_grad for p in found.head.parameters()):
        total: Tensor = _ChunkSum.apply(found.states, loss_of, parts)  # type: ignore[no-untyped-call]
        return total
    sums = [checkpoint(loss_of, found.states[part], part, use_reentrant=False) for part in parts]
    return torch.stack(sums).sum()


class _ChunkSum(torch.autograd.Function):
    """Add up the losses of chunks, whose gradients with respect to the states are taken at once."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, loss_of: Any, parts: list[slice]) -> Tensor:
        gradient, losses = torch.empty_like(states), []
        for part in parts:
            with torch.enable_grad():
                leaf = states[part].detach().requires_grad_()
                loss = loss_of(leaf, part)
                (gradient[part],) = torch.autograd.grad(loss, leaf)
            losses.append(loss.detach())
        ctx.save_for_backward(gradient)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None
