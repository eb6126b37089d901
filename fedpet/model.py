"""The model a client trains: backbone, mask and structure in one, values in and out.

    ... -> structure -> search -> [model] -> codec -> plan -> client -> ...

In:  a backbone, a mask (or none), a structure, and the seed of what is drawn.
Out: a `PetModel`: trains, reads and writes its communicated values, merges to a plain model.

The backbone is adapted in place, and stays its own class with its own names: a module is changed
by a `forward` on the instance, and only where its plain forward would not do. A change of a
tensor's own shape (a bias, a gain, a head) needs none: the parameter holds pretrained + change,
is itself the autograd leaf, and its gradient lands where the optimiser looks for it.

All trainables lie in one flat tensor, all their gradients in another; the optimiser sees one
parameter a kind of module. What the model computes with is written from pretrained + change after
each step, so nothing drifts and whatever no module names stays bit-identical (law 2).
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from fedpet.errors import BackboneError
from fedpet.modules.base import PetModule
from fedpet.modules.build import build_mask, build_structure
from fedpet.modules.head import HeadTensor
from fedpet.modules.product import PRODUCTS
from fedpet.modules.site import build_sites
from fedpet.positions import find_positions
from fedpet.structure import Structure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fedpet.backbone import Backbone
    from fedpet.mask import Mask

__all__ = ["HasLayout", "PetModel", "Segment"]


@dataclass(frozen=True)
class Segment:
    """One stretch of the communicated values."""

    kind: str  # "mask", "head", or the kind of a structure's module
    name: str  # of the parameter (mask, head) or of the module's target
    start: int
    size: int


class HasLayout(Protocol):
    """What knows of its communicated values, for each tier of devices."""

    @property
    def tiers(self) -> tuple[tuple[Segment, ...], ...]:
        """The layout of each tier, weakest first; of all last."""


class PetModel:
    """A backbone with a mask and a structure on it.

    Laws: merged outputs equal adapted ones (1); what no module names stays bit-identical (2);
    values are linear in the model for every exact module (3); `load_values` forgets what was
    loaded before; `values()` right after it gives back the same bits.
    """

    model: PreTrainedModel
    tiers: tuple[tuple[Segment, ...], ...]  # the layout of each tier, weakest first; of all last
    segments: tuple[Segment, ...]  # the layout in use
    num_values: int  # in use

    def __init__(
        self,
        backbone: Backbone,
        mask: Mask | None,
        structure: Structure,
        *,
        seed: int,
        products: str = "torch",
    ) -> None:
        """Adapt `backbone.model` in place, at the point where all values are zero.

        Args:
            backbone: Its model must be float32 (float64 passes, for tests of gradients).
            mask: Which entries of which weights may move; None for none.
            structure: Which small modules act, and where.
            seed: Of the frozen down-projections, which every device must draw alike, and of the
                first start of the adapters on biases.
            products: Whose matrix products dense layers take: "torch", or "onednn", see
                fedpet/modules/product.py.

        Raises:
            BackboneError: Parameters of another type.
            StructureError: A target that is absent or cannot carry the kind of module.
        """
        self.model = backbone.model
        _check_dtypes(self.model)
        positions = find_positions(self.model, backbone.head)
        self._mask = build_mask(self.model, {} if mask is None else mask.positions)
        tiers = () if mask is None else mask.tiers
        self._structure = build_structure(self.model, positions, structure, seed)
        heads = [HeadTensor(name, self.model.get_parameter(name)) for name in backbone.head]
        masks, weights = ((), ()) if self._mask is None else ((self._mask,), self._mask.weights)
        self._modules: list[PetModule] = [*masks, *self._structure, *heads]
        self._sites = build_sites(
            self.model, positions, weights, self._structure, PRODUCTS[products]
        )
        self._allocate()
        self._hold()
        self._gated = False
        for site in self._sites:
            site.install(gated=False)
        self.tiers = tuple(self._layout(tier) for tier in tiers) or (self._layout(None),)
        self._take_layout(self.tiers[-1])
        self.load_values(torch.zeros(self.num_values), seed=seed)

    # What the optimiser and the training loop see.

    def parameter_groups(self) -> dict[str, nn.Parameter]:
        """The trainables by kind of module, each one flat parameter with its gradient in place."""
        return dict(self._groups)

    def zero_grad(self) -> None:
        """Set all gradients to zero, in place: the optimiser's own would have to do so too."""
        self._gradient.zero_()

    @torch.no_grad()
    def after_step(self) -> None:
        """Write pretrained + change where the model computes with it. Call after every step.

        Raises:
            RuntimeError: A gradient was taken away, so that the step moved nothing.
        """
        if any(group.grad is None for group in self._groups.values()):
            raise RuntimeError(
                "the gradients of a PetModel must stay in place, and an optimiser set them to "
                "None. Call pet.zero_grad(), or optimizer.zero_grad(set_to_none=False)."
            )
        torch.add(self._held_start, self._flat[self._held_from :], out=self._held)
        if self._mask is not None:
            self._mask.write_weights()

    def proximal(self, mu: float) -> Callable[[], None] | None:
        """What adds the gradient of mu / 2 |values - values now|^2 to the gradients in place.

        Exact in the communicated values: where they are not the trainables themselves, as of an
        adapter on a bias, the term goes back to the trainables by autograd.

        Returns:
            To be called after each backward pass; None where mu is 0.
        """
        if not mu:
            return None
        indirect = {m.kind for m in self._modules if not m.sends_trainables}
        direct = [
            (group, group.detach().clone())
            for kind, group in self._groups.items()
            if kind not in indirect
        ]
        senders = (m for m in self._modules if m.kind in indirect and m.num_values)
        through = [(module, module.read().clone()) for module in senders]

        def add() -> None:
            for group, start in direct:
                assert group.grad is not None
                group.grad.add_(group.detach() - start, alpha=mu)
            for module, start in through:
                term = mu / 2 * (module.sent() - start).square().sum()
                term.backward()

        return add

    # What is communicated.

    @torch.no_grad()
    def use_tier(self, tier: int) -> None:
        """Be the model of one tier from now on: only its prefix of the mask is trained and sent.

        The model stands at the checkpoint afterwards, as it would with a mask of that density
        alone, until values are loaded. The tensors of each tier are made at its first use.

        Args:
            tier: Index into `tiers`.
        """
        if self.segments is self.tiers[tier]:
            return
        assert self._mask is not None  # without a mask there is one tier
        self._mask.use({s.name: s.size for s in self.tiers[tier] if s.kind == "mask"})
        self._groups["mask"] = self._bind("mask")
        self._take_layout(self.tiers[tier])
        for site in self._sites:
            if site.mask is not None:
                site.install(self._gated)
        self.load_values(torch.zeros(self.num_values), seed=0)

    @torch.no_grad()
    def values(self) -> Tensor:
        """What is sent: float32, (num_values,), on the CPU, a copy; zeros are the checkpoint."""
        values = self._flat.new_empty(self.num_values)
        for place, stretch in self._as_they_lie:
            values[place] = self._flat[stretch]
        for module, place in self._own_way:
            values[place] = module.read()
        return values.to(device="cpu", dtype=torch.float32)

    @torch.no_grad()
    def load_values(self, values: Tensor, *, seed: int) -> None:
        """Set the model to the point `values`, whatever was loaded before.

        Args:
            values: (num_values,), as `values()` gives them.
            seed: Of this piece of work; adapters on biases are drawn anew from it.
        """
        if values.shape != (self.num_values,):
            raise ValueError(
                f"values must have the shape ({self.num_values},) of this model's layout, got "
                f"{tuple(values.shape)}. They belong to another mask or structure."
            )
        values = values.to(self._flat)
        for place, stretch in self._as_they_lie:
            self._flat[stretch] = values[place]
        for module, place in self._own_way:
            module.write(values[place], seed)
        self._gradient.zero_()
        self.after_step()

    @torch.no_grad()
    def merged(self) -> PreTrainedModel:
        """A plain model with every change folded in: a copy that shares no memory with this one.

        Names, shapes, classes and the module tree are the pretrained model's, but for what
        `added_parameters` lists.
        """
        plain: PreTrainedModel = copy.deepcopy(self.model)
        for site in self._sites:
            plain.get_submodule(site.name).__dict__.pop("forward", None)
        for module in self._structure:
            module.merge(plain.get_submodule(module.target))
        for parameter in plain.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        return plain

    @property
    def added_parameters(self) -> tuple[str, ...]:
        """Parameters that the merged model has and the pretrained one has not; mostly none."""
        return tuple(name for m in self._structure for name in m.added_parameters)

    @property
    def inexact_kinds(self) -> tuple[str, ...]:
        """Kinds in use whose average is not the average of models; mostly none."""
        return tuple(dict.fromkeys(m.kind for m in self._structure if not m.exact))

    # Gates, for the search.

    def set_gates(self, gates: Tensor | None) -> None:
        """Multiply the effect of each of the structure's modules by its gate.

        Args:
            gates: (number of modules of the structure,), on any device, which may require a
                gradient; None takes the gates off, which is not the same computation as gates of
                1 but the same result.
        """
        if gates is not None and gates.shape != (len(self._structure),):
            raise ValueError(
                f"gates must be one a module of the structure, ({len(self._structure)},), got "
                f"{tuple(gates.shape)}."
            )
        # Unbound in one piece: taken one by one, each gate's gradient is a vector of all gates.
        here = None if gates is None else gates.to(self._flat.device)
        each = [None] * len(self._structure) if here is None else here.unbind()
        for module, gate in zip(self._structure, each, strict=True):
            module.gate = gate
        if self._gated != (gates is not None):
            self._gated = gates is not None
            for site in self._sites:
                site.install(self._gated)

    @torch.no_grad()
    def restore(self) -> None:
        """Take everything off: the backbone is the checkpoint again, and this object is done."""
        for site in self._sites:
            site.remove()
        if self._mask is not None:
            self._mask.restore()
        self._held.copy_(self._held_start)
        for parameter in self._held_parameters:
            parameter.data = parameter.data.clone()
            parameter.grad = None
            parameter.requires_grad_(False)

    # Set-up.

    def _take_layout(self, segments: tuple[Segment, ...]) -> None:
        """Find where the values of each module lie, and which may be copied in one piece."""
        self.segments = segments
        self.num_values = sum(segment.size for segment in segments)
        self._as_they_lie: list[tuple[slice, slice]] = []  # of the values, of the flat storage
        self._own_way: list[tuple[PetModule, slice]] = []  # what reads and writes by itself
        stop = 0
        for module in self._modules:
            start, stop = stop, stop + module.num_values
            if stop == start:
                continue
            if module.place == "mask" or not module.sends_trainables:
                self._own_way.append((module, slice(start, stop)))
                continue
            first = module.trainables[0].storage_offset()
            place, stretch = slice(start, stop), slice(first, first + stop - start)
            if self._as_they_lie:
                before, there = self._as_they_lie[-1]
                if (before.stop, there.stop) == (start, first):
                    self._as_they_lie.pop()
                    place, stretch = slice(before.start, stop), slice(there.start, stretch.stop)
            self._as_they_lie.append((place, stretch))

    def _layout(self, tier: Mapping[str, int] | None) -> tuple[Segment, ...]:
        """Segments of the values where the mask is cut to the tier's number of entries."""
        segments, start = [], 0
        for module in self._modules:
            for name, size in module.parts:
                if tier is not None and module.place == "mask":
                    size = tier[name]
                if size:
                    segments.append(Segment(module.kind, name, start, size))
                    start += size
        return tuple(segments)

    def _allocate(self) -> None:
        """One flat storage: a stretch for each kind, those of the held kinds at the end."""
        like = next(self.model.parameters())
        kinds = list(dict.fromkeys(module.kind for module in self._modules))
        held = {module.kind: module.held for module in self._modules}
        sizes = dict.fromkeys(sorted(kinds, key=lambda kind: held[kind]), 0)
        for module in self._modules:
            sizes[module.kind] += sum(math.prod(shape) for shape in module.shapes)
        self._flat = torch.zeros(sum(sizes.values()), dtype=like.dtype, device=like.device)
        self._gradient = torch.zeros_like(self._flat)
        self._first = dict(zip(sizes, itertools.accumulate([0, *sizes.values()]), strict=False))
        self._held_from = min(
            (first for kind, first in self._first.items() if held[kind]), default=len(self._flat)
        )
        self._groups = {kind: self._bind(kind) for kind in kinds}

    def _bind(self, kind: str) -> nn.Parameter:
        """Give the modules of a kind their views of the storage; the view of them all."""
        first = start = self._first[kind]
        for module in self._modules:
            if module.kind == kind:
                trainables = []
                for shape in module.shapes:
                    trainables.append(self._view(start, shape))
                    start += math.prod(shape)
                module.bind(trainables)
        return self._view(first, (start - first,))

    def _view(self, start: int, shape: Sequence[int]) -> nn.Parameter:
        stop = start + math.prod(shape)
        view = nn.Parameter(self._flat[start:stop].view(*shape))
        view.grad = self._gradient[start:stop].view(*shape)
        return view

    @torch.no_grad()
    def _hold(self) -> None:
        """Make the model's parameters of held modules views of one storage, and leaves.

        `_held` mirrors the end of `_flat`: pretrained + change there, change here, the gradient
        of both in one place.
        """
        self._held = torch.zeros_like(self._flat[self._held_from :])
        self._held_start = torch.zeros_like(self._held)
        self._held_parameters: list[nn.Parameter] = []
        for module in self._modules:
            parameter = self._parameter_of(module) if module.held else None
            if parameter is None:
                continue
            trainable = module.trainables[0]
            start = trainable.storage_offset() - self._held_from
            here = slice(start, start + trainable.numel())
            module.pretrained = self._held_start[here].view(trainable.shape)
            module.pretrained.copy_(parameter)
            parameter.data = self._held[here].view(trainable.shape).copy_(parameter)
            parameter.requires_grad_(True)
            parameter.grad = trainable.grad
            self._held_parameters.append(parameter)

    def _parameter_of(self, module: PetModule) -> nn.Parameter | None:
        if module.place == "tensor":
            return self.model.get_parameter(module.target)
        parameter = getattr(self.model.get_submodule(module.target), module.place, None)
        return parameter if isinstance(parameter, nn.Parameter) else None


def _check_dtypes(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise BackboneError(
                f"the backbone's parameters must be float32, and {name!r} is {parameter.dtype}. "
                "Load it with dtype=torch.float32; use autocast for half-precision passes."
            )
