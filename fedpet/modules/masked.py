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
        """Prepare one weight.

        Args:
            name: Of the parameter.
            weight: (out, in), or (in, out) where `transposed`. Written in place from now on.
            positions: int64, (k,), flat, in the order of rank.
        """
        super().__init__("mask", name)
        self.transposed = transposed
        self.weight = weight
        positions = positions.to(weight.device)
        order = torch.argsort(positions)
        flat = positions[order]
        rows, columns = weight.shape
        # Per entry: 4 bytes each for its change, gradient, start, rank, place and column, and 8
        # for the optimiser.
        self._order = order.to(torch.int32)  # rank of each entry, by position
        self._flat = flat.to(torch.int32 if weight.numel() < 2**31 else torch.int64)  # ascending
        self._start = weight.detach().reshape(-1)[flat]  # w0 there
        crow = torch.zeros(rows + 1, dtype=torch.int32, device=weight.device)
        crow[1:] = torch.cumsum(torch.bincount(flat // columns, minlength=rows), 0)
        self._crow, self._columns = crow, (flat % columns).to(torch.int32)
        self._pattern: Tensor | None = None
        self._blocks: list[int] | None = None  # entries up to the end of each block of rows
        if len(flat) > DENSE_FROM * weight.numel():
            self._blocks = [*crow[BLOCK_ROWS:rows:BLOCK_ROWS].tolist(), len(flat)]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return ((len(self._flat),),)

    def share_zeros(self, zeros: Tensor) -> None:
        """Take the values of the pattern, which are never read, from a shared tensor."""
        with warnings.catch_warnings():  # "sparse CSR is in beta", once a process
            warnings.simplefilter("ignore")
            self._pattern = torch.sparse_csr_tensor(
                self._crow, self._columns, zeros[: len(self._flat)], self.weight.shape
            )

    def write(self, values: Tensor, seed: int) -> None:
        self.trainables[0].detach().copy_(values[self._order])

    def read(self) -> Tensor:
        v = self.trainables[0].detach()
        return torch.empty_like(v).index_copy_(0, self._order.to(torch.int64), v)

    def write_weight(self) -> None:
        """Write w0 + v into the weight, under no_grad."""
        self._put(self._start + self.trainables[0])

    def restore(self) -> None:
        """Write w0 back."""
        self._put(self._start)

    def _put(self, entries: Tensor) -> None:
        self.weight.view(-1).index_copy_(0, self._flat.to(torch.int64), entries)

    def gradient(self, kept: Kept, source: Tensor, g: Tensor, live: Tensor | None) -> Tensor:
        """The weight's gradient at the positions, ascending: (k,).

        Args:
            kept: Input of the layer,
            source: and what it is made from.
            g: Gradient of its output, (tokens, out).
            live: The tokens that `g` is given for; None where it is given for all.
        """
        dtype = self.weight.dtype
        g = g.to(dtype)
        if self._blocks is not None:
            x = kept.rows(source, dtype)
            x = x if live is None else x[live]
            left, right = (x, g) if self.transposed else (g, x)
            return self._gradient_by_blocks(left, right, self._blocks)
        if live is None:
            x = kept.columns(source, dtype)
        else:
            x = kept.rows(source, dtype)[live].T.contiguous()
        g = g.T.contiguous()
        left, right = (x, g) if self.transposed else (g, x)  # (rows, tokens), (columns, tokens)
        assert self._pattern is not None
        sampled: Tensor = torch.sparse.sampled_addmm(self._pattern, left, right.T, beta=0.0)
        return sampled.values()

    def _gradient_by_blocks(self, left: Tensor, right: Tensor, ends: Sequence[int]) -> Tensor:
        """The same for many positions: dense products of a few rows at a time, then a choice."""
        gradient = torch.empty_like(self._start)
        columns = self.weight.shape[1]
        start = 0
        for block, stop in enumerate(ends):
            row = block * BLOCK_ROWS
            dense = left[:, row : row + BLOCK_ROWS].T @ right  # (BLOCK_ROWS, columns)
            chosen = self._flat[start:stop] - row * columns  # index_select takes int32
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
        source: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(weight, source)
        ctx.mask = mask
        ctx.kept = kept
        ctx.shape = x.shape
        ctx.dtype = x.dtype
        ctx.input_columns = in_columns(x)
        matrix = weight.T if mask.transposed else weight  # (out, in)
        if torch.is_autocast_enabled(x.device.type):
            return nn.functional.linear(x, matrix, bias)
        rows = x.reshape(-1, x.shape[-1])
        if columns:  # in memory (out, tokens)
            y = matrix @ rows.T if bias is None else torch.addmm(bias[:, None], matrix, rows.T)
            y = y.T
        else:
            y = rows @ matrix.T if bias is None else torch.addmm(bias, rows, matrix.T)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        weight, source = ctx.saved_tensors
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
            grad_v = mask.gradient(ctx.kept, source, g, live)
        ctx.kept.release()
        if ctx.needs_input_grad[0]:
            matrix = (weight.T if mask.transposed else weight).to(g.dtype)  # (out, in)
            if ctx.input_columns:
                grad_x = matrix.T @ g.T if live is None else _spread(matrix.T @ g.T, live, tokens)
                grad_x = grad_x.T
            else:
                grad_x = g @ matrix if live is None else _spread(g @ matrix, live, tokens, 0)
            grad_x = grad_x.to(ctx.dtype).view(ctx.shape)
        return grad_x, None, grad_bias, grad_v, None, None, None, None


def _spread(columns: Tensor, live: Tensor, tokens: int, dim: int = 1) -> Tensor:
    """Put what was computed for the live tokens in its place, zeros for the others."""
    shape = list(columns.shape)
    shape[dim] = tokens
    return columns.new_zeros(shape).index_copy_(dim, live, columns)


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
    return _MaskedLinear.apply(x, weight, bias, v, mask, columns, *keep(x))  # type: ignore[no-any-return, no-untyped-call]
