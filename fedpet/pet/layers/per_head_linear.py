"""Apply a dense layer of an attention a head at a time, and the same backwards.

In:  what one head of a key or a value projection is multiplied with, and what acts on the layer.
Out: the product with that head's rows of the weight; in backward, the trainables' gradients.

Where only one query of a text attends, keys and values of all its tokens need not be made: the
score of a token x is q . (K x) = (K^T q) . x, and the mean of values V x is V times the mean of x.
K and V are multiplied with one vector a text and head instead of one a token; see
`fedpet/training/cls_attention.py`, which uses this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedpet.pet.kernels.input_recompute import to_columns
from fedpet.pet.modules.lora import LowRankBranch
from fedpet.pet.modules.masked_weight import MaskedWeight

__all__ = ["PerHeadLinear", "by_heads"]


@dataclass(frozen=True)
class PerHeadLinear:
    """The linear part of a dense layer with weight (out, in), and its bias."""

    weight: Tensor
    bias: Callable[[], Tensor | None]  # (out,), as trained
    mask: MaskedWeight | None = None
    branches: Sequence[LowRankBranch] = ()

    def to_inputs(self, z: Tensor) -> Tensor:
        """Multiply each head's z by its rows of the weight.

        Args:
            z: (heads, n, out / heads).

        Returns:
            (heads, n, in).
        """
        y = self._times(z, to_inputs=True)
        for branch in self.branches:
            down, up = branch.factors()
            y = y + branch.scaled(torch.bmm(z, _heads(up, z))) @ down
        return y

    def to_outputs(self, z: Tensor) -> Tensor:
        """Multiply each head's rows of the weight by its z, without the bias.

        Args:
            z: (heads, n, in).

        Returns:
            (heads, n, out / heads).
        """
        y = self._times(z, to_inputs=False)
        for branch in self.branches:
            down, up = branch.factors()
            y = y + torch.bmm(branch.scaled(z @ down.t()), _heads(up, z).mT)
        return y

    def _times(self, z: Tensor, *, to_inputs: bool) -> Tensor:
        if self.mask is None:
            heads = _heads(self.weight, z)
            return torch.bmm(z, heads if to_inputs else heads.mT)
        return _MaskedByHeads.apply(z, self.weight, self.mask, to_inputs, self.mask.move)  # type: ignore[no-any-return, no-untyped-call]


def by_heads(module: nn.Module) -> PerHeadLinear | None:
    """Return a dense layer so applied; None where something acts on it that this leaves out."""
    own = module.__dict__.get("forward")
    if own is not None:
        known: PerHeadLinear | None = getattr(own, "by_heads", None)
        return known
    if type(module) is not nn.Linear:
        return None
    return PerHeadLinear(module.weight, lambda: module.bias)


class _MaskedByHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, weight: Tensor, mask: MaskedWeight, to_inputs: bool, trainable: Tensor
    ) -> Tensor:
        weight = mask.changed(to_keep=True)
        heads = _heads(weight, z)
        ctx.save_for_backward(z, weight)
        ctx.mask, ctx.to_inputs = mask, to_inputs
        return torch.bmm(z, heads if to_inputs else heads.mT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        z, weight = ctx.saved_tensors
        heads = _heads(weight, z)
        of_output, of_input = (z, g) if ctx.to_inputs else (g, z)
        columns = to_columns(of_input.reshape(-1, of_input.shape[-1]))  # (in, heads * n)
        gradient = ctx.mask.sampled(columns, _on_diagonal(of_output))
        of_z = torch.bmm(g, heads.mT if ctx.to_inputs else heads)
        return of_z, None, None, None, gradient


def _heads(tensor: Tensor, z: Tensor) -> Tensor:
    """View (out, ...) as (heads, out / heads, ...)."""
    return tensor.view(len(z), -1, tensor.shape[-1])


def _on_diagonal(z: Tensor) -> Tensor:
    """Lay (heads, n, size) as columns (heads * size, heads * n), zeros between heads."""
    heads, n, size = z.shape
    columns = z.new_zeros(heads, size, heads, n)
    columns.diagonal(dim1=0, dim2=2).copy_(z.permute(2, 1, 0))
    return columns.view(heads * size, heads * n)
