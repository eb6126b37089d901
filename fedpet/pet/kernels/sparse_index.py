"""Index the trained entries of one weight, in the order in which the weight holds them.

In:  a weight, and the flat positions that may move, in the order of their rank.
Out: the same in ascending order: ranks, positions, pretrained numbers, and the rows and columns of
     a CSR matrix for the sampled product; of all entries, or of those of the lowest ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["BLOCK_ROWS", "DENSE_FROM", "ConcatenatedIndex", "SparseIndex"]

# Past this density of a weight, products of blocks of rows cost less than the sampled product.
DENSE_FROM = 0.15
BLOCK_ROWS = 128


@dataclass(frozen=True)
class SparseIndex:
    """k entries of one weight, ascending by position.

    16 bytes an entry; its change, gradient and the optimiser's two moments are 16 more.
    """

    rank: Tensor  # int32, (k,): the place of each among the values that are sent,
    first: int  # of which this weight's are those from `first` on
    flat: Tensor  # (k,): its position; int32 where that is enough
    start: Tensor  # (k,): w0 there; float32 of bfloat16 weights
    crow: Tensor  # int32, (rows + 1,): entries before each row
    columns: Tensor  # int32, (k,)
    blocks: list[int] | None  # entries up to the end of each block of rows, where there are many

    @classmethod
    def of(cls, weight: Tensor, positions: Tensor) -> SparseIndex:
        """Index entries of `weight` at `positions`, int64, (k,), flat, in the order of rank."""
        rank = torch.argsort(positions)
        flat = positions[rank]
        start = weight.detach().reshape(-1)[flat]
        rows, columns = weight.shape
        crow = torch.zeros(rows + 1, dtype=torch.int32, device=weight.device)
        crow[1:] = torch.cumsum(torch.bincount(flat // columns, minlength=rows), 0)
        return cls(
            rank.to(torch.int32),
            0,
            flat.to(torch.int32 if weight.numel() < 2**31 else torch.int64),
            start.to(torch.promote_types(start.dtype, torch.float32)),
            crow,
            (flat % columns).to(torch.int32),
            _blocks(crow, weight),
        )

    def prefix(self, count: int, weight: Tensor) -> SparseIndex:
        """Take the `count` entries of the lowest rank. Of the weight it reads the shape alone."""
        inside = self.rank < self.first + count
        before = torch.cat([self.crow[:1], inside.cumsum(0, dtype=torch.int32)])  # (k + 1,)
        crow = before[self.crow.long()]
        return SparseIndex(
            self.rank[inside] - self.first,
            0,
            self.flat[inside],
            self.start[inside],
            crow,
            self.columns[inside],
            _blocks(crow, weight),
        )


@dataclass(frozen=True)
class ConcatenatedIndex:
    """The entries of several weights, one behind the other, in one tensor each."""

    rank: Tensor  # int32, (n,): the place of each among all values that are sent
    flat: Tensor  # (n,): its position in its own weight
    start: Tensor  # (n,)
    parts: tuple[SparseIndex, ...]  # views

    @classmethod
    def of(cls, parts: Sequence[SparseIndex]) -> ConcatenatedIndex:
        """Join `parts`; the values of each come behind those of the one before."""
        sizes = [len(part.rank) for part in parts]
        firsts = [0, *itertools.accumulate(sizes)]
        rank = torch.cat(
            [part.rank + (first - part.first) for part, first in zip(parts, firsts, strict=False)]
        )
        flat = torch.cat([part.flat for part in parts])
        start = torch.cat([part.start for part in parts])
        views = zip(*(torch.split(whole, sizes) for whole in (rank, flat, start)), strict=True)
        joined = tuple(
            replace(part, rank=r, first=first, flat=f, start=s)
            for part, first, (r, f, s) in zip(parts, firsts, views, strict=False)
        )
        return cls(rank, flat, start, joined)


def _blocks(crow: Tensor, weight: Tensor) -> list[int] | None:
    count = int(crow[-1])
    if count <= DENSE_FROM * weight.numel():
        return None
    return [*crow[BLOCK_ROWS : len(weight) : BLOCK_ROWS].tolist(), count]
