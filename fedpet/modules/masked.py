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
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedpet.modules.base import PetModule
from fedpet.modules.kept import Kept, in_columns, keep

# Past this density of a weight, products of blocks of rows cost less than the sampled product.
DENSE_FROM = 0.15
BLOCK_ROWS = 128

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
        self._blocks: list[int] | None = None  # past this density: entries up to each block's end
        if len(flat) > DENSE_FROM * weight.numel():
            self._blocks = crow[1:][BLOCK_ROWS - 1 :: BLOCK_ROWS].tolist()
            if rows % BLOCK_ROWS:
                self._blocks.append(len(flat))

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
        self.weight.view(-1).index_copy_(0, self._flat, self._start + self.trainables[0])

    def restore(self) -> None:
        """Write w0 back."""
        self.weight.view(-1).index_copy_(0, self._flat, self._start)

    def gradient(self, kept: Kept, g: Tensor, live: Tensor | None) -> Tensor:
        """The weight's gradient at the positions, ascending: (k,).

        Args:
            kept: Input of the layer.
            g: Gradient of its output, (tokens, out).
            live: The tokens that `g` is given for; None where it is given for all.
        """
        dtype = self.weight.dtype
        g = g.to(dtype)
        if self._blocks is not None:
            x = kept.rows(dtype) if live is None else kept.rows(dtype)[live]
            left, right = (x, g) if self.transposed else (g, x)
            return self._gradient_by_blocks(left, right, self._blocks)
        x = kept.columns(dtype) if live is None else kept.rows(dtype)[live].T.contiguous()
        g = g.T.contiguous()
        left, right = (x, g) if self.transposed else (g, x)  # (rows, tokens), (columns, tokens)
        return torch.sparse.sampled_addmm(self.pattern, left, right.T, beta=0.0).values()

    def _gradient_by_blocks(self, left: Tensor, right: Tensor, ends: Sequence[int]) -> Tensor:
        """The same for many positions: dense products of a few rows at a time, then a choice."""
        gradient = torch.empty_like(self._start)
        columns = self.weight.shape[1]
        start = 0
        for block, stop in enumerate(ends):
            row = block * BLOCK_ROWS
            dense = left[:, row : row + BLOCK_ROWS].T @ right  # (BLOCK_ROWS, columns)
            chosen = self._flat[start:stop] - row * columns
            torch.index_select(dense.view(-1), 0, chosen, out=gradient[start:stop])
            start = stop
        return gradient

    def merge(self, module: nn.Module) -> None:
        """Nothing to do: the weight holds the change already."""


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        v: Tensor,
        mask: MaskedWeight,
        columns: bool,
        kept: Kept,
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.mask = mask
        ctx.kept = kept
        ctx.shape = x.shape
        ctx.dtype = x.dtype
        ctx.input_columns = in_columns(x)
        matrix = weight.T if mask.transposed else weight  # (out, in)
        if columns and not torch.is_autocast_enabled(x.device.type):
            inputs = x.reshape(-1, x.shape[-1]).T
            y = matrix @ inputs if bias is None else torch.addmm(bias[:, None], matrix, inputs)
            return y.T.view(*x.shape[:-1], -1)  # in memory (out, tokens)
        return nn.functional.linear(x, matrix, bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        mask: MaskedWeight = ctx.mask
        grad_x = grad_bias = grad_v = None
        g = g.reshape(-1, g.shape[-1])  # (tokens, out)
        if ctx.needs_input_grad[2]:
            grad_bias = g.sum(0).to(weight.dtype)
        tokens = len(g)
        live = _live(g)
        if live is not None:
            g = g[live]
        if ctx.needs_input_grad[3]:
            grad_v = mask.gradient(ctx.kept, g, live)
        ctx.kept.release()
        if ctx.needs_input_grad[0]:
            matrix = (weight.T if mask.transposed else weight).to(g.dtype)  # (out, in)
            if live is not None:
                grad_x = g.new_zeros(tokens, matrix.shape[1])
                grad_x[live] = g @ matrix
            else:
                grad_x = (matrix.T @ g.T).T if ctx.input_columns else g @ matrix
            grad_x = grad_x.to(ctx.dtype).view(ctx.shape)
        return grad_x, None, grad_bias, grad_v, None, None, None


def _live(g: Tensor) -> Tensor | None:
    """The tokens whose output gradient is not zero, (n,), where leaving out the rest pays.

    In the last layer of a classifier only the first token has a gradient, and a padding token
    has none in any layer. A look at eight columns tells whether it is worth looking at all.
    """
    tokens, width = g.shape
    if tokens < 64 or g.device.type != "cpu":  # on a GPU the look would wait for it
        return None
    sample = g[:, :: max(1, width // 8)]
    if int(torch.count_nonzero(sample.any(1))) > 0.75 * tokens:
        return None
    live = g.any(1).nonzero().flatten()
    return live if len(live) <= 0.75 * tokens else None


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    v: Tensor,
    mask: MaskedWeight,
    columns: bool = False,
) -> Tensor:
    """x W^T + b, where the gradient with respect to W is taken at the mask's positions, as v's.

    Args:
        x: (..., in).
        weight: (out, in), or (in, out) where the mask is transposed; holds w0 + v.
        bias: (out,) or None.
        v: (k,), in ascending order of positions; its numbers are not read.
        columns: Lay the output in memory as (out, tokens), for an activation that knows it.
    """
    if not torch.is_grad_enabled():
        return nn.functional.linear(x, weight.T if mask.transposed else weight, bias)
    return _MaskedLinear.apply(x, weight, bias, v, mask, columns, keep(x))  # type: ignore[no-any-return, no-untyped-call]
