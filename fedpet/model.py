"""The model a client trains: backbone, mask and structure in one, values in and out.

    ... -> structure -> search -> [model] -> codec -> plan -> client -> ...

In:  a backbone, a mask (or none), a structure, and the seed of what is drawn.
Out: a `PetModel`: trains, reads and writes its communicated values, merges to a plain model.

The backbone is adapted in place, and stays its own class with its own names: a module is changed
by a `forward` on the instance, and only where its plain forward would not do. What the model
computes with is written from pretrained + change after each step, so nothing drifts and whatever
no module names stays bit-identical (law 2). Where trainables and values lie: `modules/storage.py`
and `layout.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedpet.errors import BackboneError
from fedpet.layout import Segment, places_of, segments_of
from fedpet.modules.base import PetModule
from fedpet.modules.build import build_mask, build_structure
from fedpet.modules.head import HeadTensor
from fedpet.modules.product import PRODUCTS
from fedpet.modules.site import build_sites
from fedpet.modules.storage import FlatStorage
from fedpet.positions import find_positions
from fedpet.structure import Structure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fedpet.backbone import Backbone
    from fedpet.mask import Mask

__all__ = ["PetModel"]


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
        heads = [HeadTensor(name, self.model.get_parameter(name)) for name in backbone.trained_head]
        masks, weights = ((), ()) if self._mask is None else ((self._mask,), self._mask.weights)
        self._modules: list[PetModule] = [*masks, *self._structure, *heads]
        self._sites = build_sites(
            self.model, positions, weights, self._structure, PRODUCTS[products]
        )
        self._storage = FlatStorage(self.model, self._modules)
        self._gated = False
        for site in self._sites:
            site.install(gated=False)
        of_tiers = (segments_of(self._modules, tier) for tier in tiers)
        self.tiers = tuple(of_tiers) or (segments_of(self._modules, None),)
        self._take_layout(self.tiers[-1])
        self.load_values(torch.zeros(self.num_values), seed=seed)

    # What the optimiser and the training loop see.

    def parameter_groups(self) -> dict[str, nn.Parameter]:
        """The trainables by kind of module, each one flat parameter with its gradient in place."""
        return dict(self._storage.groups)

    def zero_grad(self) -> None:
        """Set all gradients to zero, in place: the optimiser's own would have to do so too."""
        self._storage.gradient.zero_()

    @torch.no_grad()
    def after_step(self) -> None:
        """Write pretrained + change where the model computes with it. Call after every step.

        Raises:
            RuntimeError: A gradient was taken away, so that the step moved nothing.
        """
        if any(group.grad is None for group in self._storage.groups.values()):
            raise RuntimeError(
                "the gradients of a PetModel must stay in place, and an optimiser set them to "
                "None. Call pet.zero_grad(), or optimizer.zero_grad(set_to_none=False)."
            )
        self._storage.write_held()
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
            for kind, group in self._storage.groups.items()
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
        self._storage.bind("mask")
        self._take_layout(self.tiers[tier])
        for site in self._sites:
            if site.mask is not None:
                site.install(self._gated)
        self.load_values(torch.zeros(self.num_values), seed=0)

    @torch.no_grad()
    def values(self) -> Tensor:
        """What is sent: float32, (num_values,), on the CPU, a copy; zeros are the checkpoint."""
        flat = self._storage.flat
        values = flat.new_empty(self.num_values)
        for place, stretch in self._as_they_lie:
            values[place] = flat[stretch]
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
        flat = self._storage.flat
        values = values.to(flat)
        for place, stretch in self._as_they_lie:
            flat[stretch] = values[place]
        for module, place in self._own_way:
            module.write(values[place], seed)
        self._storage.gradient.zero_()
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
        here = None if gates is None else gates.to(self._storage.flat.device)
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
        self._storage.release()

    def _take_layout(self, segments: tuple[Segment, ...]) -> None:
        self.segments = segments
        self.num_values = sum(segment.size for segment in segments)
        self._as_they_lie, self._own_way = places_of(self._modules)


def _check_dtypes(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise BackboneError(
                f"the backbone's parameters must be float32, and {name!r} is {parameter.dtype}. "
                "Load it with dtype=torch.float32; use autocast for half-precision passes."
            )
