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

import torch
from torch import Tensor, nn

from fedpet.modules.base import PetModule
from fedpet.modules.entries import BLOCK_ROWS, Entries
from fedpet.modules.kept import Kept

__all__ = ["MaskedWeight"]


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
        # Whether backward adds to the gradient's storage itself, or gives autograd a gradient.
        self.in_place = False
        whole = Entries.of(weight, positions.to(weight.device))
        self._entries = whole
        self._tiers = {len(whole.flat): whole}  # by number of entries

    def use(self, count: int) -> None:
        """Train the `count` entries of the lowest rank from now on; the others hold w0 again.

        `bind` comes next: the trainable has another length.
        """
        self.restore()
        if count not in self._tiers:
            whole = self._tiers[max(self._tiers)]
            self._tiers[count] = whole.prefix(count, self.weight)
        self._entries = self._tiers[count]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return ((len(self._entries.flat),),)

    def bind(self, trainables: Sequence[Tensor]) -> None:
        super().bind(trainables)
        gradient = trainables[0].grad
        if gradient is None:
            gradient = torch.zeros_like(self._entries.start)
        with warnings.catch_warnings():  # "sparse CSR is in beta", once a process
            warnings.simplefilter("ignore")
            self._gradient = torch.sparse_csr_tensor(  # a view: its values are `gradient`
                self._entries.crow, self._entries.columns, gradient, self.weight.shape
            )

    def write(self, values: Tensor, seed: int) -> None:
        self.trainables[0].detach().copy_(values[self._entries.rank])

    def read(self) -> Tensor:
        v = self.trainables[0].detach()
        return torch.empty_like(v).index_copy_(0, self._entries.rank.to(torch.int64), v)

    def write_weight(self) -> None:
        """Write w0 + v into the weight, under no_grad."""
        self._put(self._entries.start + self.trainables[0])

    def restore(self) -> None:
        """Write w0 back."""
        self._put(self._entries.start)

    def _put(self, entries: Tensor) -> None:
        self.weight.view(-1).index_copy_(0, self._entries.flat.to(torch.int64), entries)

    def gradient(self, kept: Kept, source: Tensor, g: Tensor, live: Tensor | None) -> Tensor | None:
        """The weight's gradient at the positions, ascending: (k,); None where `in_place`.

        Args:
            kept: Input of the layer,
            source: and what it is made from.
            g: Gradient of its output, (tokens, out).
            live: The tokens that `g` is given for; None where it is given for all.
        """
        dtype = self.weight.dtype
        if g.dtype != dtype:
            g = g.to(dtype)
        if self._entries.blocks is not None:
            x = kept.rows(source, dtype, live)
            left, right = (x, g) if self.transposed else (g, x)
            return self._gradient_by_blocks(left, right, self._entries.blocks)
        if live is None:
            x = kept.columns(source, dtype)
        else:
            x = kept.rows(source, dtype, live).t().contiguous()
        g = g.t().contiguous()
        left, right = (x, g) if self.transposed else (g, x)  # (rows, tokens), (columns, tokens)
        if self.in_place:
            into = self._gradient
            torch.sparse.sampled_addmm(into, left, right.t(), beta=1.0, out=into)
            return None
        sampled: Tensor = torch.sparse.sampled_addmm(self._gradient, left, right.t(), beta=0.0)
        return sampled.values()

    def _gradient_by_blocks(
        self, left: Tensor, right: Tensor, ends: Sequence[int]
    ) -> Tensor | None:
        """The same for many positions: dense products of a few rows at a time, then a choice."""
        gradient = torch.empty_like(self._entries.start)
        columns = self.weight.shape[1]
        start = 0
        for block, stop in enumerate(ends):
            row = block * BLOCK_ROWS
            dense = left[:, row : row + BLOCK_ROWS].t() @ right  # (BLOCK_ROWS, columns)
            chosen = self._entries.flat[start:stop] - row * columns  # index_select takes int32
            torch.index_select(dense.view(-1), 0, chosen, out=gradient[start:stop])
            start = stop
        if self.in_place:
            self._gradient.values().add_(gradient)
            return None
        return gradient

    def merge(self, module: nn.Module) -> None:
        """Nothing to do: the weight holds the change already."""
