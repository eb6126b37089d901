"""Train a few entries of the dense weights, the mask, without a dense gradient.

In:  the dense weights, and for each the flat positions that may move, in the order of their rank.
Out: the change at each position, as values in that order, weight by weight.

The weight holds w0 + v in place, so the forward pass is that of a plain layer. Backward computes
the weight's gradient at the positions only, a sampled product of the output gradient and the
input; a gradient of the weight's shape never exists. After the optimiser's step the entries are
written as w0 + v from the saved w0: nothing drifts, and no other entry is ever written.

Weights that processes share, or that are quantised, hold w0 and are never written: a pass copies
or dequantises the weight of one layer, writes w0 + v into the copy and multiplies; the next layer's
copy takes its place.

Source: PaFi (Liao, Meng and Monz, ACL 2023, arXiv:2305.16742): the entries; the compact vector
and the sampled product are ours.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedpet.backbone.quantised import QuantisedWeight
from fedpet.pet.kernels.input_recompute import SavedInput, to_columns
from fedpet.pet.kernels.sparse_index import BLOCK_ROWS, ConcatenatedIndex, SparseIndex
from fedpet.pet.modules.base import PetModule
from fedpet.utils.heap import keep_step_buffers

__all__ = ["MaskedWeight", "MaskedWeights"]


class MaskedWeights(PetModule):
    """Changes of a few entries of many dense weights. Exact.

    A trainable a weight, in the order in which it holds the entries, all one behind the other;
    values, in the order of rank, go in and out by one choice of places for all.
    """

    place = "mask"

    def __init__(self, weights: Sequence[MaskedWeight]) -> None:
        super().__init__("mask", "")
        keep_step_buffers()
        self.weights = tuple(weights)
        self._shared = any(part.shared for part in weights)
        room = _Room()
        for part in weights:
            part.room = room
        self._flat_weights = [part.weight.detach().view(-1) for part in weights if not self._shared]
        self._tiers: dict[tuple[int, ...], ConcatenatedIndex] = {}
        self._gates: Tensor | None = None  # one an entry, in the order of the trainables
        self._whole = self._take(ConcatenatedIndex.of([part.entries for part in weights]))

    @property
    def parts(self) -> tuple[tuple[str, int], ...]:
        return tuple((part.name, part.num_values) for part in self.weights)

    def use(self, counts: Mapping[str, int]) -> None:
        """Train of each weight only so many entries, those of the lowest rank; none if not named.

        All other entries hold w0 again. `bind` comes next: the trainable has another length.
        """
        self.restore()
        wanted = tuple(counts.get(part.name, 0) for part in self.weights)
        entries = self._tiers.get(wanted)
        if entries is None:
            pairs = zip(self.weights, self._whole.parts, wanted, strict=True)
            entries = ConcatenatedIndex.of(
                [whole.prefix(count, part.weight) for part, whole, count in pairs]
            )
        self._take(entries)

    def _take(self, entries: ConcatenatedIndex) -> ConcatenatedIndex:
        self._entries = entries
        self._tiers[tuple(len(part.flat) for part in entries.parts)] = entries
        self._sizes = [len(part.flat) for part in entries.parts]
        # Of each weight the positions as they are written by, at each step and each client's start.
        self._places = torch.split(entries.flat.to(torch.int64), self._sizes)
        for part, own in zip(self.weights, entries.parts, strict=True):
            part.entries = own
        return entries

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple((size,) for size in self._sizes)

    def bind(self, trainables: Sequence[Tensor]) -> None:
        super().bind(trainables)
        for part, trainable in zip(self.weights, trainables, strict=True):
            part.bind(trainable)
        # They lie one behind the other: one tensor for what is done to all.
        first, size = trainables[0].detach(), (sum(self._sizes),)
        self._changes = first.as_strided(size, (1,), first.storage_offset())

    def write(self, values: Tensor, seed: int) -> None:
        torch.index_select(values, 0, self._entries.rank, out=self._changes)

    def read(self) -> Tensor:
        return self.by_rank(self._changes)

    def set_gates(self, gates: Tensor | None) -> None:
        """Multiply each entry's change by a gate, in the weights and in backward.

        Args:
            gates: One a value, (k,), in the order of the values; None takes them off.
        """
        each: Sequence[Tensor | None] = [None] * len(self.weights)
        self._gates = None
        if gates is not None:
            here = gates[self._entries.rank.to(torch.int64)].to(self._changes)
            self._gates, each = here.detach(), torch.split(here, self._sizes)
        for part, own in zip(self.weights, each, strict=True):
            part.gates = own

    def _moves(self) -> Tensor:
        """Return what is added to the entries: the changes, times their gates."""
        return self._changes if self._gates is None else self._changes * self._gates

    def by_rank(self, changes: Tensor) -> Tensor:
        """Put trainables, (..., k), one behind the other, into the order of the values."""
        places = self._entries.rank.to(torch.int64)
        return torch.empty_like(changes).index_copy_(-1, places, changes)

    def numbers(self, changes: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return of each weight the positions, int64, (k,), and w0 + v there: (..., k)."""
        split = torch.split(self._entries.start + changes, self._sizes, dim=-1)
        return list(zip(self._places, split, strict=True))

    def write_weights(self) -> None:
        """Write w0 + v into the weights, under no_grad, unless they are shared."""
        if not self._shared:
            self._put(self._entries.start + self._moves())

    def is_written(self) -> bool:
        """Tell whether the weights are w0 + v, where they are to be."""
        if self._shared:
            return True
        changed = self._entries.start + self._moves()
        pairs = zip(self._flat_weights, self._places, strict=True)
        now = torch.cat([flat[places] for flat, places in pairs])
        return torch.equal(changed.to(now.dtype), now)

    def restore(self) -> None:
        """Write w0 back."""
        if not self._shared:
            self._put(self._entries.start)

    def merge_into(self, model: nn.Module) -> None:
        """Write w0 + v into the weights of a plain model, under no_grad, that had w0 alone."""
        if self._shared:
            for part in self.weights:
                part.put(model.get_parameter(part.name).view(-1))

    def _put(self, entries: Tensor) -> None:
        changed = torch.split(entries, self._sizes)
        for flat, places, numbers in zip(self._flat_weights, self._places, changed, strict=True):
            flat.index_copy_(0, places, numbers.to(flat.dtype))

    def merge(self, module: nn.Module) -> None:
        """Do nothing: the weights have the changes already."""


class _Room:
    """Memory for the copy of one weight at a time."""

    def __init__(self) -> None:
        self._flat: Tensor | None = None

    def copy(self, weight: Tensor) -> Tensor:
        """Copy a weight to a place as far from a multiple of 64 bytes: products round by that."""
        size, flat = weight.element_size(), self._flat
        wanted = weight.numel() + 64 // size
        if flat is None or len(flat) < wanted or flat.dtype != weight.dtype:
            flat = self._flat = weight.new_empty(wanted)
        first = (weight.data_ptr() - flat.data_ptr()) % 64 // size
        return flat[first : first + weight.numel()].view(weight.shape).copy_(weight)


class MaskedWeight:
    """One weight of the mask: its entries, and their gradient."""

    def __init__(
        self,
        name: str,
        weight: Tensor,
        positions: Tensor,
        transposed: bool,
        *,
        shared: bool = False,
    ) -> None:
        """Prepare one weight.

        Args:
            name: Of the parameter.
            weight: (out, in), or (in, out) where `transposed`. Written in place from now on.
            positions: int64, (k,), flat, in the order of rank.
            transposed: The layer is a Conv1D.
            shared: Never write into the weight, as of a quantised one.
        """
        self.name = name
        self.shared = shared
        self.room = _Room()
        self.transposed = transposed
        self.weight = weight
        self.entries = SparseIndex.of(weight, positions.to(weight.device))
        # Whether backward adds to the gradient's storage itself, or gives autograd a gradient.
        self.in_place = False
        self.gates: Tensor | None = None  # of a search: one an entry, as `trainable` lies

    @property
    def num_values(self) -> int:
        return len(self.entries.flat)

    @property
    def move(self) -> Tensor:
        """Return what is added to the entries, for autograd: the trainable, times its gates."""
        return self.trainable if self.gates is None else self.trainable * self.gates

    def changed(self, *, to_keep: bool = False) -> Tensor:
        """Return w0 + v: the weight itself, or a copy where the weight is never written.

        Such a copy is valid until the next weight is asked for, unless it is `to_keep`.
        """
        if not self.shared:
            return self.weight
        if isinstance(self.weight, QuantisedWeight):
            copied = self.weight.dequantise()
        else:
            copied = (_Room() if to_keep else self.room).copy(self.weight.detach())
        self.put(copied.view(-1))
        return copied

    def put(self, flat: Tensor) -> None:
        """Write w0 + v at the positions of a flat weight, under no_grad."""
        changed = self.entries.start + self.move.detach()
        flat.index_copy_(0, self.entries.flat.to(torch.int64), changed.to(flat.dtype))

    def bind(self, trainable: Tensor) -> None:
        """Take this weight's changes, (k,), ascending by position."""
        self.trainable = trainable
        gradient = trainable.grad
        if gradient is None:
            gradient = torch.zeros_like(self.entries.start)
        with warnings.catch_warnings():  # "sparse CSR is in beta", once a process
            warnings.simplefilter("ignore")
            self._gradient = torch.sparse_csr_tensor(  # a view: its values are `gradient`
                self.entries.crow, self.entries.columns, gradient, self.weight.shape
            )

    def gradient(
        self, saved: SavedInput, source: Tensor, g: Tensor, live: Tensor | None
    ) -> Tensor | None:
        """Compute the weight's gradient at the positions, ascending: (k,); None where `in_place`.

        Args:
            saved: Input of the layer,
            source: and what it is made from.
            g: Gradient of its output, (tokens, out).
            live: The tokens that `g` is given for; None where it is given for all.
        """
        dtype = self.entries.start.dtype
        if g.dtype != dtype:
            g = g.to(dtype)
        if self.entries.blocks is not None:
            return self.sampled(saved.rows(source, dtype, live).t(), g.t())
        if live is None:
            x = saved.columns(source, dtype)
        else:
            x = to_columns(saved.rows(source, dtype, live))
        return self.sampled(x, to_columns(g))

    def sampled(self, x: Tensor, g: Tensor) -> Tensor | None:
        """Multiply both at the positions: as `gradient`, of columns.

        Args:
            x: Input of the layer, (in, tokens); contiguous, but for entries in blocks.
            g: Gradient of its output, (out, tokens), likewise.
        """
        left, right = (x, g) if self.transposed else (g, x)  # (rows, tokens), (columns, tokens)
        if self.entries.blocks is not None:
            return self._by_blocks(left, right, self.entries.blocks)
        if self.in_place:
            into = self._gradient
            torch.sparse.sampled_addmm(into, left, right.t(), beta=1.0, out=into)
            return None
        sampled: Tensor = torch.sparse.sampled_addmm(self._gradient, left, right.t(), beta=0.0)
        return sampled.values()

    def _by_blocks(self, left: Tensor, right: Tensor, ends: Sequence[int]) -> Tensor | None:
        """Do the same for many positions: dense products of a few rows at a time, then a choice."""
        gradient = torch.empty_like(self.entries.start)
        columns = self.weight.shape[1]
        start = 0
        for block, stop in enumerate(ends):
            row = block * BLOCK_ROWS
            dense = left[row : row + BLOCK_ROWS] @ right.t()  # (BLOCK_ROWS, columns)
            chosen = self.entries.flat[start:stop] - row * columns  # index_select takes int32
            torch.index_select(dense.view(-1), 0, chosen, out=gradient[start:stop])
            start = stop
        if self.in_place:
            self._gradient.values().add_(gradient)
            return None
        return gradient
