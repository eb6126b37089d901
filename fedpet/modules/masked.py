"""The masked weight: a few entries of a dense weight, trained without a dense gradient.

In:  a dense weight, and the flat positions that may move, in the order of their rank.
Out: the change at each position, as values in that order.

The weight holds w0 + v in place, so the forward pass is that of a plain layer. Backward computes
the weight's gradient at the positions only, a sampled product of the output gradient and the
input; a gradient of the weight's shape never exists. After the optimiser's step the entries are
written as w0 + v from the saved w0: nothing drifts, and no other entry is ever written.

Source: PaFi (Liao, Meng and Monz, ACL 2023, arXiv:2305.16742): the entries; the compact vector
and the sampled product are ours.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedpet.modules.base import PetModule

__all__ = ["MaskedWeight", "masked_linear"]


class MaskedWeight(PetModule):
    """Changes of a few entries of one dense weight. Exact."""

    place = "mask"

    def __init__(self, name: str, weight: Tensor, positions: Tensor, transposed: bool) -> None:
        super().__init__("mask", name)
        self.transposed = transposed  # weight is (in, out)
        self.weight = weight
        order = torch.argsort(positions)
        flat = positions[order].to(weight.device)
        self._order = order.to(weight.device)  # rank of each entry, by position
        self._flat = flat  # ascending
        self._start = weight.detach().reshape(-1)[flat]  # w0 there
        rows, columns = weight.shape
        counts = torch.bincount(flat // columns, minlength=rows)
        crow = torch.zeros(rows + 1, dtype=torch.int32, device=weight.device)
        crow[1:] = torch.cumsum(counts, 0)
        with warnings.catch_warnings():  # "sparse CSR is in beta", once a process
            warnings.simplefilter("ignore")
            self.pattern = torch.sparse_csr_tensor(
                crow,
                (flat % columns).to(torch.int32),
                torch.zeros(len(flat), dtype=weight.dtype, device=weight.device),
                (rows, columns),
            )

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return ((len(self._flat),),)

    def write(self, values: Tensor, seed: int) -> None:
        self.trainables[0].detach().copy_(values[self._order])

    def read(self) -> Tensor:
        v = self.trainables[0].detach()
        values = torch.empty_like(v)
        values[self._order] = v
        return values

    def write_weight(self) -> None:
        """Write w0 + v into the weight, under no_grad."""
        self.weight.view(-1)[self._flat] = self._start + self.trainables[0]

    def restore(self) -> None:
        """Write w0 back."""
        self.weight.view(-1)[self._flat] = self._start

    def gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """The weight's gradient at the positions, ascending: (k,).

        Args:
            x: Input of the layer, (tokens, in).
            g: Gradient of its output, (tokens, out).
        """
        left, right = (x, g) if self.transposed else (g, x)  # (tokens, rows), (tokens, columns)
        dtype = self.weight.dtype
        sampled = torch.sparse.sampled_addmm(
            self.pattern, left.to(dtype).T, right.to(dtype), beta=0.0
        )
        return sampled.values()

    def merge(self, module: nn.Module) -> None:
        """Nothing to do: the weight holds the change already."""


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, v: Tensor, mask: MaskedWeight
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.mask = mask
        return nn.functional.linear(x, weight.T if mask.transposed else weight, bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        mask: MaskedWeight = ctx.mask
        grad_x = grad_bias = grad_v = None
        flat_g = g.reshape(-1, g.shape[-1])
        if ctx.needs_input_grad[0]:
            w = weight.to(g.dtype)
            grad_x = (g @ (w.T if mask.transposed else w)).to(x.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = flat_g.sum(0).to(weight.dtype)
        if ctx.needs_input_grad[3]:
            grad_v = mask.gradient(x.reshape(-1, x.shape[-1]), flat_g)
        return grad_x, None, grad_bias, grad_v, None


def masked_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, v: Tensor, mask: MaskedWeight
) -> Tensor:
    """x W^T + b, where the gradient with respect to W is taken at the mask's positions, as v's."""
    return _MaskedLinear.apply(x, weight, bias, v, mask)  # type: ignore[no-any-return, no-untyped-call]
