"""Compute a dense layer with a masked weight, low-rank branches or both as one autograd step.

In:  the layer's input, its weight and bias, its mask and the branches beside it.
Out: its output; in backward, the input's gradient, and the trainables' added where they lie.

Forward is a plain product; a branch adds its own to the output in place. Backward takes the
weight's gradient at the mask's positions only. Trainables of a `PetModel` hold their gradients in
one flat tensor, and backward adds to that itself: nothing is allocated, copied or added again.
In a search each branch has a gate, which meets the r numbers a token between its two factors; then
gradients are returned, since that of the gates is asked for alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedpet.backbone.quantised import plain
from fedpet.pet.kernels.input_recompute import SavedInput, in_columns, save_input
from fedpet.pet.kernels.matmul import Product, torch_matmul
from fedpet.pet.modules.lora import LowRankBranch
from fedpet.pet.modules.masked_weight import MaskedWeight

__all__ = ["LinearSpec", "dense"]


@dataclass(frozen=True)
class LinearSpec:
    """All that acts on one dense layer."""

    transposed: bool  # weight is (in, out)
    mask: MaskedWeight | None = None
    branches: Sequence[LowRankBranch] = ()
    columns: bool = False  # lay the output in memory as (out, tokens)
    product: Product = torch_matmul

    @property
    def trainables(self) -> list[Tensor]:
        """List v of the mask, times its gates in a search, then B of each branch."""
        of_mask = () if self.mask is None else (self.mask.move,)
        return [*of_mask, *(branch.trainables[0] for branch in self.branches)]

    def matrix(self, weight: Tensor) -> Tensor:
        """Return what the layer multiplies with, (out, in): `weight` with the mask's changes."""
        changed = plain(weight) if self.mask is None else self.mask.changed()
        return changed.t() if self.transposed else changed


def dense(
    x: Tensor, weight: Tensor, bias: Tensor | None, plan: LinearSpec, trainables: Sequence[Tensor]
) -> Tensor:
    """Compute x W^T + b and the branches, times their gates where they have some.

    Args:
        x: (..., in).
        weight: (out, in), or (in, out) where transposed; holds w0 + v, or w0 where it is never
            written. A quantised one is read anew by each pass. It gets no gradient.
        bias: (out,) or None.
        plan: What acts on the layer.
        trainables: The plan's, in its order. The numbers of v are not read: the weight has them.
    """
    if torch.is_grad_enabled():
        saved, source = (None, None) if plan.mask is None else save_input(x)
        gates = [branch.gate for branch in plan.branches]
        return _Dense.apply(x, weight, bias, plan, saved, source, *trainables, *gates)  # type: ignore[no-any-return, no-untyped-call]
    matrix, bias = plan.matrix(weight), bias if bias is None else bias.to(x.dtype)
    if plan.product is torch_matmul:
        y = nn.functional.linear(x, matrix, bias)
    else:
        y = plan.product(x.reshape(-1, x.shape[-1]), matrix, bias).view(*x.shape[:-1], -1)
    for branch in plan.branches:
        y = y + branch.gated(x)
    return y


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        plan: LinearSpec,
        saved: SavedInput | None,
        source: Tensor | None,
        *trainables_and_gates: Tensor | None,
    ) -> Tensor:
        gates = trainables_and_gates[len(trainables_and_gates) - len(plan.branches) :]
        matrix = plan.matrix(weight)
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        ctx.bias_dtype = None if bias is None else bias.dtype
        bias = bias if bias is None else bias.to(x.dtype)
        inner = []  # x A^T of each branch, (tokens, r)
        if torch.is_autocast_enabled(x.device.type):
            y = nn.functional.linear(rows, matrix, bias)
            for branch, gate in zip(plan.branches, gates, strict=True):
                down, up = branch.factors()
                inner.append(nn.functional.linear(rows, down))
                y = y + branch.scale * nn.functional.linear(_times(inner[-1], gate), up)
        elif plan.columns:  # in memory (out, tokens)
            y = plan.product(matrix, rows, None if bias is None else bias[:, None])
            for branch, gate in zip(plan.branches, gates, strict=True):
                down, up = branch.factors_as(x.dtype)
                inner.append(rows @ down.t())
                y.addmm_(up, _times(inner[-1], gate).t(), alpha=branch.scale)
            y = y.t()
        else:
            y = plan.product(rows, matrix, bias)
            for branch, gate in zip(plan.branches, gates, strict=True):
                down, up = branch.factors_as(x.dtype)
                inner.append(rows @ down.t())
                y.addmm_(_times(inner[-1], gate), up.t(), alpha=branch.scale)
        ctx.save_for_backward(weight, source, *inner, *gates)
        ctx.plan, ctx.saved = plan, saved
        ctx.shape, ctx.dtype, ctx.input_columns = x.shape, x.dtype, in_columns(x)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        weight, source, *others = ctx.saved_tensors
        plan: LinearSpec = ctx.plan
        inner, gates = others[: len(plan.branches)], others[len(plan.branches) :]
        needs_x, _, needs_bias, *_ = ctx.needs_input_grad
        if g.dim() != 2:
            g = g.reshape(-1, g.shape[-1])  # (tokens, out)
        grad_bias = g.sum(0, dtype=ctx.bias_dtype) if needs_bias else None
        tokens = g.shape[0]
        live = _live(g)
        if live is not None:
            g = g[live]
        gradients: list[Tensor | None] = []
        of_gates: list[Tensor | None] = []
        if plan.mask is not None:
            gradients.append(plan.mask.gradient(ctx.saved, source, g, live))
            ctx.saved.release()
        grad_x = None
        if needs_x:
            matrix = plan.matrix(weight).to(g.dtype).t()  # (in, out)
            if ctx.input_columns:  # in memory (in, tokens) as well
                grad_x = plan.product(matrix, g, None).t()
            else:
                grad_x = plan.product(g, matrix, None)
        for branch, u, gate in zip(plan.branches, inner, gates, strict=True):
            of_up, of_gate = branch.gradient(u if live is None else u[live], g, grad_x, gate)
            gradients.append(of_up)
            of_gates.append(of_gate)
        if grad_x is not None:
            if live is not None:
                grad_x = _spread(grad_x, live, tokens, ctx.input_columns)
            if grad_x.dtype != ctx.dtype:
                grad_x = grad_x.to(ctx.dtype)
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, grad_bias, None, None, None, *gradients, *of_gates


def _times(inner: Tensor, gate: Tensor | None) -> Tensor:
    return inner if gate is None else inner * gate


def _spread(part: Tensor, live: Tensor, tokens: int, columns: bool) -> Tensor:
    """Put what was computed for the live tokens in its place, zeros for the others."""
    width = part.shape[1]
    if columns:
        return part.new_zeros(width, tokens).index_copy_(1, live, part.t()).t()
    return part.new_zeros(tokens, width).index_copy_(0, live, part)


def _live(g: Tensor) -> Tensor | None:
    """Find the tokens whose output gradient is not zero, (n,), where leaving out the rest pays.

    In the last layer of a classifier only the first token has a gradient, and a padding token
    has none in any layer. A look at eight numbers of some sixty tokens tells whether it is worth
    looking at all; an odd distance between them does not fall in step with padded rows.
    """
    tokens, width = g.shape
    if tokens < 64 or g.device.type != "cpu":  # on a GPU the look would wait for it
        return None
    sample = g[:: tokens // 64 | 1, :: max(1, width // 8)]
    if int(torch.count_nonzero(sample)) > 0.45 * sample.numel():
        return None
    live = g.any(1).nonzero().flatten()
    return live if len(live) <= 0.7 * tokens else None
