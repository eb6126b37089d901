"""Adapt a model in place: a mask and small modules on it, their values in and out.

In:  a backbone, a mask (or none), a structure, and the seed of what is drawn.
Out: a `TrainableModel`, an `nn.Module` that any loop trains and whose values are one vector.

The backbone stays its own class with its own names: a module is changed by a `forward` on the
instance, and only where its plain forward would not do. What the model computes with is written
from pretrained + change, so nothing drifts and whatever no module names stays bit-identical
(law 2). That is done before a forward pass, by a hook on the backbone, where a trainable was
moved: a training loop calls nothing of ours. Where trainables and values lie:
`layers/flat_parameters.py` and `layout.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from fedpet.backbone.module_roles import find_target_modules
from fedpet.backbone.pretrained import fingerprint
from fedpet.errors import BackboneError
from fedpet.pet.kernels.matmul import PRODUCTS
from fedpet.pet.layers.flat_parameters import FlatParameters, is_adapted
from fedpet.pet.layers.injection import build_sites
from fedpet.pet.layout import Segment, segments_of, split_trainables
from fedpet.pet.modules.base import GatedModule, PetModule
from fedpet.pet.modules.building import build_masked_weights, build_structure
from fedpet.pet.modules.head import HeadTensor
from fedpet.pet.structure import Structure
from fedpet.pet.wrapper import ModelWrapper

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fedpet.backbone.pretrained import Backbone
    from fedpet.config import MaskConfig
    from fedpet.pet.mask import Mask

__all__ = ["TrainableModel", "check_dtype", "check_plain"]


class TrainableModel(ModelWrapper):
    """A transformer whose trainables are a mask, small modules and a head.

    Laws: merged outputs equal adapted ones (1); what no module names stays bit-identical (2);
    values are linear in the model for every exact module (3); `set_delta` forgets what was
    loaded before; `get_delta` right after it gives back the same bits.

    Attributes:
        model: The adapted model. `merge_and_unload` and `unload` make it a plain one again.
        trainable: The trainables by kind of module.
        tiers: The layout of the values of each tier of devices, weakest first; of all last.
        segments: The layout in use.
        num_values: How many values are communicated, in the layout in use.
    """

    model: PreTrainedModel
    tiers: tuple[tuple[Segment, ...], ...]
    segments: tuple[Segment, ...]
    num_values: int

    def __init__(
        self,
        backbone: Backbone,
        mask: Mask | None,
        structure: Structure,
        *,
        seed: int,
        products: str = "torch",
        mask_config: MaskConfig | None = None,
    ) -> None:
        """Adapt `backbone.model` in place, at the point where all values are zero.

        Args:
            backbone: Its model must be float32, or bfloat16, on which values, gradients, heads and
                trained norms are float32 (float64 passes, for tests of gradients).
            mask: Which entries of which weights may move; None for none.
            structure: Which small modules act, and where.
            seed: Of the frozen down-projections, which every device must draw alike, and of the
                first start of the adapters on biases.
            products: Whose matrix products dense layers take: "torch", or "onednn", see
                fedpet/pet/kernels/matmul.py.
            mask_config: Gives the mask, where `save_pretrained` shall be able to say so.

        Raises:
            BackboneError: Parameters of another type, or a model that is adapted already.
            StructureError: A target that is absent or cannot carry the kind of module.
        """
        super().__init__()
        for name, parameter in backbone.model.named_parameters():
            if parameter.dtype != torch.bfloat16:
                check_dtype(f"the backbone's parameter {name!r}", parameter.dtype)
        check_plain(backbone.model)
        self.structure = structure
        self.seed = seed
        self.mask_config = mask_config
        self._backbone, self._chosen, self._products = backbone, mask, products
        self._fingerprint = ""
        self._adapt()
        self.wrap(backbone.model, self._storage.groups)

    def _adapt(self) -> None:
        """Put mask, modules and head on the model, at zero values."""
        backbone, mask = self._backbone, self._chosen
        model = backbone.model
        positions = find_target_modules(model, backbone.head)
        positions_of = {} if mask is None else mask.positions
        self._mask = build_masked_weights(model, positions_of, shared=backbone.shared)
        tiers = () if mask is None else mask.tiers
        self._structure = build_structure(model, positions, self.structure, self.seed)
        heads = [HeadTensor(name, model.get_parameter(name)) for name in backbone.trained_head]
        masks, weights = ((), ()) if self._mask is None else ((self._mask,), self._mask.weights)
        self._pet_modules: list[PetModule] = [*masks, *self._structure, *heads]
        product = PRODUCTS[self._products]
        self._sites = build_sites(
            model, positions, weights, self._structure, product, backbone.trained_head
        )
        earlier: FlatParameters | None = self.__dict__.get("_storage")
        self._storage = FlatParameters(
            model, self._pet_modules, None if earlier is None else earlier.groups
        )
        self._hook = self._storage.hook(model)
        self._gated = False
        self._blocks: Tensor | None = None  # of each of the mask's values, see `gate_mask`
        for site in self._sites:
            site.install(gated=False)
        of_tiers = (segments_of(self._pet_modules, tier) for tier in tiers)
        self.tiers = tuple(of_tiers) or (segments_of(self._pet_modules, None),)
        self._take_layout(self.tiers[-1])
        self.set_delta(torch.zeros(self.num_values), seed=self.seed)

    # What the optimiser and the training loop see.

    def parameter_groups(self) -> dict[str, nn.Parameter]:
        """Return the trainables by kind of module, one flat parameter each, with its gradient."""
        return dict(self._storage.groups)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set all gradients to zero, in place whatever is asked for."""
        self._storage.gradient.zero_()

    def after_step(self) -> None:
        """Write pretrained + change where the model computes with it, without waiting for a pass.

        A loop need not call it; one that does spares the next forward pass a comparison.
        """
        self._storage.write()

    def sent_values(self) -> tuple[list[nn.Parameter], list[Callable[[], Tensor]]]:
        """Split what is sent: trainables as they are, and functions of trainables.

        FedProx's term is exact in the values that are sent. Those of an adapter on a bias are
        computed from what is trained, and each such function gives its module's, (n,).
        """
        senders = [m for m in self._pet_modules if not m.sends_trainables]
        indirect = {module.kind for module in senders}
        groups = self._storage.groups.items()
        return (
            [group for kind, group in groups if kind not in indirect],
            [m.sent for m in self._pet_modules if m.kind in indirect and m.num_values],
        )

    # What is communicated.

    @torch.no_grad()
    def set_tier(self, tier: int) -> None:
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
        self.set_delta(torch.zeros(self.num_values), seed=0)

    @torch.no_grad()
    def get_delta(self) -> Tensor:
        """Return the communicated values: float32, (num_values,), on the CPU, a copy.

        They stand in the order of `segments`: mask, modules, head. Zeros are the checkpoint.
        """
        flat = self._storage.flat
        values = flat.new_empty(self.num_values)
        for place, stretch in self._direct:
            values[place] = flat[stretch]
        for module, place in self._indirect:
            values[place] = module.read()
        return values.to(device="cpu", dtype=torch.float32)

    @torch.no_grad()
    def set_delta(self, delta: Tensor | np.ndarray, *, seed: int = 0) -> None:
        """Set the model to the point `delta`, whatever it was before.

        Args:
            delta: (num_values,), as `get_delta` gives it.
            seed: HiWi's adapters on biases start anew, drawn from it.

        Raises:
            ValueError: Another length.
        """
        values = torch.as_tensor(delta)
        if values.shape != (self.num_values,):
            raise ValueError(
                f"values must have the shape ({self.num_values},) of this model's layout, got "
                f"{tuple(values.shape)}. They belong to another mask or structure."
            )
        flat = self._storage.flat
        values = values.to(flat)
        for place, stretch in self._direct:
            flat[stretch] = values[place]
        for module, place in self._indirect:
            module.write(values[place], seed)
        self._storage.gradient.zero_()
        self._storage.write()

    @property
    def structure_modules(self) -> tuple[GatedModule, ...]:
        """The modules that the structure names, in its order."""
        return tuple(self._structure)

    @property
    def inexact_kinds(self) -> tuple[str, ...]:
        """List the kinds in use whose average is not the average of models; mostly none."""
        return tuple(dict.fromkeys(m.kind for m in self._structure if not m.exact))

    @property
    def added_parameters(self) -> tuple[str, ...]:
        """Name parameters that the merged model has and the pretrained one has not; mostly none."""
        return tuple(name for m in self._structure for name in m.added_parameters)

    # Where it stands.

    @property
    def mask(self) -> Mask | None:
        """Return the entries of the dense weights that may move, of the strongest tier."""
        return self._chosen

    @property
    def source(self) -> str:
        """Return the backbone's name, as it was loaded."""
        return self._backbone.source

    def head_starts(self) -> dict[str, Tensor]:
        """Return the start of each parameter that trains in full: its values count from there."""
        heads = [module for module in self._pet_modules if isinstance(module, HeadTensor)]
        return {head.target: head.pretrained for head in heads if head.pretrained is not None}

    def fingerprint(self) -> str:
        """Take the SHA-256 of the model as it was, but for what trains in full; once.

        It is `Backbone.fingerprint` where a checkpoint lacks just that.
        """
        if not self._fingerprint:
            head = self._backbone.trained_head
            with self._plain():
                named = self.model.named_parameters()
                self._fingerprint = fingerprint((n, p) for n, p in named if n not in head)
        return self._fingerprint

    @property
    def head(self) -> tuple[str, ...]:
        """Name the parameters of the head, trained or not: no mask or module acts on them."""
        return self._backbone.head

    # Gates, for the search.

    def gate_mask(self, sizes: Sequence[int]) -> None:
        """Give stretches of the mask's values gates of their own, which come before the modules'.

        Args:
            sizes: Of the stretches, in the order of the values; together all values of the mask.
        """
        assert self._mask is not None
        assert sum(sizes) == self._mask.num_values
        each = torch.tensor(sizes, device=self._storage.flat.device)
        self._blocks = torch.arange(len(each), device=each.device).repeat_interleave(each)

    @property
    def num_gates(self) -> int:
        """Count the gates: one a stretch of the mask that `gate_mask` names, one a module."""
        blocks = 0 if self._blocks is None else int(self._blocks[-1]) + 1
        return blocks + len(self._structure)

    def set_gates(self, gates: Tensor | None) -> None:
        """Multiply the effect of each of the structure's modules by its gate.

        Args:
            gates: (num_gates,), on any device, which may require a gradient; None takes the gates
                off, which is not the same computation as gates of 1 but the same result.
        """
        if gates is not None and gates.shape != (self.num_gates,):
            raise ValueError(
                f"gates must be one a module of the structure, ({self.num_gates},), got "
                f"{tuple(gates.shape)}."
            )
        # Unbound in one piece: taken one by one, each gate's gradient is a vector of all gates.
        here = None if gates is None else gates.to(self._storage.flat.device)
        if self._mask is not None and self._blocks is not None:
            first = self.num_gates - len(self._structure)
            self._mask.set_gates(None if here is None else here[:first][self._blocks])
            here = None if here is None else here[first:]
            with torch.no_grad():
                self._mask.write_weights()
        each = [None] * len(self._structure) if here is None else here.unbind()
        for module, gate in zip(self._structure, each, strict=True):
            module.gate = gate
        if self._gated != (gates is not None):
            self._gated = gates is not None
            for site in self._sites:
                site.install(self._gated)

    # Off the model and on again.

    @torch.no_grad()
    def unload(self) -> PreTrainedModel:
        """Take every change off and give the model back as it was; this object is done."""
        self._hook.remove()
        for site in self._sites:
            site.remove()
        if self._mask is not None:
            self._mask.restore()
        self._storage.release()
        return self.model

    @contextmanager
    def _plain(self) -> Iterator[None]:
        """Make the model the plain checkpoint within this context; afterwards all is as it was."""
        point = self._point()
        self.unload()
        try:
            yield
        finally:
            self._adapt()
            for kind, group in self._storage.groups.items():
                self.trainable[kind] = group
            self._go_to(*point)

    def _point(self) -> tuple[int, Tensor, Tensor]:
        """Return the tier, the trainables and the points they count from."""
        tier = next(i for i, own in enumerate(self.tiers) if own is self.segments)
        return tier, self._storage.flat.clone(), self.get_extra_state()

    @torch.no_grad()
    def _go_to(self, tier: int, flat: Tensor, origins: Tensor) -> None:
        self.set_tier(tier)
        self._storage.flat.copy_(flat)
        self.set_extra_state(origins)

    def get_extra_state(self) -> Tensor:
        """Return the points that trainables count from, for `state_dict`: one vector.

        That is the head's start and the biases on which HiWi's adapters last started.
        """
        origins = [m.origin for m in self._pet_modules if m.origin is not None]
        return torch.cat([self._storage.flat[:0], *(origin.reshape(-1) for origin in origins)])

    @torch.no_grad()
    def set_extra_state(self, state: Tensor) -> None:
        start = 0
        for module in self._pet_modules:
            if (origin := module.origin) is not None:
                module.count_from(state[start : start + origin.numel()].view_as(origin).to(origin))
                start += origin.numel()
        self._storage.write()

    def _take_layout(self, segments: tuple[Segment, ...]) -> None:
        self.segments = segments
        self.num_values = sum(segment.size for segment in segments)
        self._direct, self._indirect = split_trainables(self._pet_modules)


def check_dtype(what: str, dtype: torch.dtype) -> None:
    """Refuse parameters in which small changes would be lost.

    Raises:
        BackboneError: Neither float32 nor float64.
    """
    if dtype not in (torch.float32, torch.float64):
        raise BackboneError(
            f"parameters must be float32, and {what} is {dtype}. Load the model with "
            "dtype=torch.float32, or torch.bfloat16 for frozen weights of half the size."
        )


def check_plain(model: nn.Module) -> None:
    """Refuse a model that is adapted already.

    Raises:
        BackboneError: It is a `PetModel`, or is inside one.
    """
    if isinstance(model, ModelWrapper) or is_adapted(model):
        raise BackboneError(
            "this model carries trainables of a PetModel already. Call unload() or "
            "merge_and_unload() of that one first, or load the model anew."
        )
