"""Wrap a model so that a mask and small modules are what trains, by any loop.

    ... -> structure -> search -> [model] -> codec -> plan -> client -> ...

In:  a backbone, a mask (or none), a structure, and the seed of what is drawn.
Out: a `PetModel`, an `nn.Module`: trains, reads and writes its communicated values, merges to a
     plain model.

The backbone is adapted in place, and stays its own class with its own names: a module is changed
by a `forward` on the instance, and only where its plain forward would not do. What the model
computes with is written from pretrained + change, so nothing drifts and whatever no module names
stays bit-identical (law 2). That is done before a forward pass, by a hook on the backbone, where
a trainable was moved: a training loop calls nothing of ours. Where trainables and values lie:
`modules/storage.py` and `layout.py`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from fedpet.errors import BackboneError
from fedpet.layout import Segment, places_of, segments_of
from fedpet.modules.base import PetModule
from fedpet.modules.build import build_mask, build_structure
from fedpet.modules.head import HeadTensor
from fedpet.modules.product import PRODUCTS
from fedpet.modules.site import build_sites
from fedpet.modules.storage import FlatStorage, is_adapted, unpin
from fedpet.pet.wrapper import ModelWrapper
from fedpet.positions import find_positions
from fedpet.structure import Structure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fedpet.backbone import Backbone
    from fedpet.config import MaskConfig
    from fedpet.mask import Mask

__all__ = ["PetModel"]


class PetModel(ModelWrapper):
    """A transformer whose trainables are a mask, small modules and a head.

    Train it with `transformers.Trainer` or any loop over `parameters()`, which are the trainables:
    one flat parameter a kind of module. Its forward and attributes are those of the model inside.

    Laws: merged outputs equal adapted ones (1); what no module names stays bit-identical (2);
    values are linear in the model for every exact module (3); `load_values` forgets what was
    loaded before; `values()` right after it gives back the same bits.

    Attributes:
        model: The adapted model. `merge_and_unload` and `unload` make it a plain one again.
        trainable: The trainables by kind of module.
        tiers: The layout of the values of each tier of devices, weakest first; of all last.
        segments: The layout in use.
        num_values: How many values are communicated, in the layout in use.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> small = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        ...                    intermediate_size=64, vocab_size=50)
        >>> model = get_pet_model(
        ...     BertForSequenceClassification(small), PetConfig(modules=[LayerNormConfig()]))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        >>> ids, labels = torch.tensor([[2, 7, 9, 3], [2, 8, 4, 3]]), torch.tensor([0, 1])
        >>> for step in range(3):
        ...     loss = model(input_ids=ids, labels=labels).loss
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        >>> delta = model.get_delta()
        >>> delta.shape == (model.num_values,), bool(delta.any())
        (True, True)
        >>> model.set_delta(0.5 * delta)
        >>> type(model.merge_and_unload()).__name__
        'BertForSequenceClassification'
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
            backbone: Its model must be float32 (float64 passes, for tests of gradients).
            mask: Which entries of which weights may move; None for none.
            structure: Which small modules act, and where.
            seed: Of the frozen down-projections, which every device must draw alike, and of the
                first start of the adapters on biases.
            products: Whose matrix products dense layers take: "torch", or "onednn", see
                fedpet/modules/product.py.
            mask_config: Gives the mask, where `save_pretrained` shall be able to say so.

        Raises:
            BackboneError: Parameters of another type, or a model that is adapted already.
            StructureError: A target that is absent or cannot carry the kind of module.
        """
        super().__init__()
        _check_dtypes(backbone.model)
        if is_adapted(backbone.model):
            raise BackboneError(
                "this model carries trainables of a PetModel already. Call unload() or "
                "merge_and_unload() of that one first, or load the model anew."
            )
        self.structure = structure
        self.seed = seed
        self.mask_config = mask_config
        self._backbone, self._chosen, self._products = backbone, mask, products
        self._adapt()
        self.wrap(backbone.model, self._storage.groups)

    def _adapt(self, tier: int = -1) -> None:
        """Put mask, modules and head on the model, at zero values."""
        model, mask, head = self._backbone.model, self._chosen, self._backbone.head
        positions = find_positions(model, head)
        self._mask = build_mask(model, {} if mask is None else mask.positions)
        tiers = () if mask is None else mask.tiers
        self._structure = build_structure(model, positions, self.structure, self.seed)
        heads = [HeadTensor(name, model.get_parameter(name)) for name in head]
        masks, weights = ((), ()) if self._mask is None else ((self._mask,), self._mask.weights)
        self._pet_modules: list[PetModule] = [*masks, *self._structure, *heads]
        product = PRODUCTS[self._products]
        self._sites = build_sites(model, positions, weights, self._structure, product)
        earlier: FlatStorage | None = self.__dict__.get("_storage")
        self._storage = FlatStorage(
            model, self._pet_modules, None if earlier is None else earlier.groups
        )
        self._hook = self._storage.hook(model)
        self._gated = False
        for site in self._sites:
            site.install(gated=False)
        of_tiers = (segments_of(self._pet_modules, tier) for tier in tiers)
        self.tiers = tuple(of_tiers) or (segments_of(self._pet_modules, None),)
        self._take_layout(self.tiers[-1])
        self.load_values(torch.zeros(self.num_values), seed=self.seed)
        self.use_tier(tier)

    # What `nn.Module` asks for beside what the wrapper gives.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to a device or a type; an optimiser made before keeps its parameters."""
        flat = self._storage.flat
        probe = fn(flat[:0])
        if (probe.dtype, probe.device) == (flat.dtype, flat.device):
            return self
        if probe.dtype not in _DTYPES:
            raise _wrong_dtype("a PetModel", probe.dtype)
        with self._taken_off():
            self.model._apply(fn)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> PetModel:
        """A model of its own at the same point."""
        point = self._point()
        with self._taken_off():
            plain = copy.deepcopy(self.model, memo)
        twin = PetModel(
            dataclasses.replace(self._backbone, model=plain),
            self._chosen,
            self.structure,
            seed=self.seed,
            products=self._products,
            mask_config=self.mask_config,
        )
        twin._go_to(*point)
        twin.train(self.training)
        memo[id(self)] = twin
        return twin

    def get_extra_state(self) -> Tensor:
        """What the trainables count from, for `state_dict`: one vector.

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

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many parameters train, and how many there are, as peft counts them."""
        trained = sum(group.numel() for group in self.parameters())
        beside = sum(
            trainable.numel()
            for module in self._pet_modules
            if module.place != "mask" and not (module.held and module.pretrained is not None)
            for trainable in module.trainables
        )
        return trained, self._num_dense + beside

    @property
    def _num_dense(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def print_trainable_parameters(self) -> None:
        """Print peft's line, and what a client uploads a round against FedAvg of all parameters."""
        trained, everything = self.get_nb_trainable_parameters()
        dense = self._num_dense
        print(
            f"trainable params: {trained:,d} || all params: {everything:,d} || "
            f"trainable%: {100 * trained / everything:.4f}\n"
            f"upload a round (float32): {4 * self.num_values:,d} bytes || dense FedAvg: "
            f"{4 * dense:,d} bytes || upload%: {100 * self.num_values / dense:.4f}"
        )

    # What the optimiser and the training loop see.

    def parameter_groups(self) -> dict[str, nn.Parameter]:
        """The trainables by kind of module, each one flat parameter with its gradient in place."""
        return dict(self._storage.groups)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set all gradients to zero, in place whatever is asked for."""
        self._storage.gradient.zero_()

    def after_step(self) -> None:
        """Write pretrained + change where the model computes with it, without waiting for a pass.

        A loop need not call it; one that does spares the next forward pass a comparison.
        """
        self._storage.write()

    def proximal(self, mu: float) -> Callable[[], None] | None:
        """What adds the gradient of mu / 2 |values - values now|^2 to the gradients in place.

        Exact in the communicated values: where they are not the trainables themselves, as of an
        adapter on a bias, the term goes back to the trainables by autograd.

        Returns:
            To be called after each backward pass; None where mu is 0.
        """
        if not mu:
            return None
        indirect = {m.kind for m in self._pet_modules if not m.sends_trainables}
        direct = [
            (group, group.detach().clone())
            for kind, group in self._storage.groups.items()
            if kind not in indirect
        ]
        senders = (m for m in self._pet_modules if m.kind in indirect and m.num_values)
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

    def get_delta(self) -> Tensor:
        """The communicated values: float32, (num_values,), on the CPU; zeros are the checkpoint.

        They stand in the order of `segments`: mask, modules, head.
        """
        return self.values()

    def set_delta(self, delta: Tensor | np.ndarray, *, seed: int = 0) -> None:
        """Set the model to the point `delta`, whatever it was before.

        Args:
            delta: (num_values,), as `get_delta` gives it.
            seed: HiWi's adapters on biases start anew, drawn from it.

        Raises:
            ValueError: Another length.
        """
        self.load_values(torch.as_tensor(delta), seed=seed)

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
        self._storage.write()

    @torch.no_grad()
    def merged(self) -> PreTrainedModel:
        """A plain model with every change folded in: a copy that shares no memory with this one.

        Names, shapes, classes and the module tree are the pretrained model's, but for what
        `added_parameters` lists.
        """
        self._storage.refresh()
        self._hook.remove()
        try:
            plain: PreTrainedModel = copy.deepcopy(self.model)
        finally:
            self._hook = self._storage.hook(self.model)
        for site in self._sites:
            plain.get_submodule(site.name).__dict__.pop("forward", None)
        for module in self._structure:
            module.merge(plain.get_submodule(module.target))
        for parameter in plain.parameters():
            unpin(parameter)
        return plain

    @torch.no_grad()
    def merge_and_unload(self) -> PreTrainedModel:
        """Fold every change into the model and give it back; this object is done.

        Unlike `merged` it copies nothing: what comes back is the object that was adapted, a plain
        model of its own class.
        """
        self._storage.refresh()
        self._hook.remove()
        for site in self._sites:
            site.remove()
        for module in self._structure:
            module.merge(self.model.get_submodule(module.target))
        self._storage.release(merged=True)
        return self.model

    def unload(self) -> PreTrainedModel:
        """Take every change off and give the model back as it was; this object is done."""
        self.restore()
        return self.model

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
        self._hook.remove()
        for site in self._sites:
            site.remove()
        if self._mask is not None:
            self._mask.restore()
        self._storage.release()

    # What is kept of it.

    @property
    def mask(self) -> Mask | None:
        """The entries of the dense weights that may move, of the strongest tier."""
        return self._chosen

    @property
    def source(self) -> str:
        """The backbone's name, as it was loaded."""
        return self._backbone.source

    def head_starts(self) -> dict[str, Tensor]:
        """What trains in full, by name of the parameter: the numbers that its values count from."""
        heads = [module for module in self._pet_modules if isinstance(module, HeadTensor)]
        return {head.target: head.pretrained for head in heads if head.pretrained is not None}

    def fingerprint(self) -> str:
        """SHA-256 over the checkpoint, the head left out; taken once, for that reads all of it."""
        if not self._backbone.fingerprint:
            from fedpet.backbone import fingerprint

            head = self._backbone.head
            with self._taken_off():
                named = self.model.named_parameters()
                found = fingerprint((n, p) for n, p in named if n not in head)
            self._backbone.fingerprint = found
        return self._backbone.fingerprint

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the trainables alone, see fedpet/pet/pet_files.py: a few MB at most.

        Args:
            folder: Made, where it is absent.
        """
        from fedpet.pet.pet_files import save_pet

        save_pet(self, Path(folder))

    @classmethod
    def from_pretrained(cls, model: nn.Module, folder: str | Path) -> PetModel:
        """Put what `save_pretrained` wrote on a model again, which is adapted in place.

        Args:
            model: The backbone that they were trained on, as its checkpoint has it. Its head may
                be drawn anew: the saved one stands in its place.
            folder: Written by `save_pretrained`.

        Raises:
            BackboneError: Another backbone.
            InputError: No such folder.
        """
        from fedpet.pet.pet_files import load_pet

        return load_pet(cls, model, Path(folder))

    # Off the model and on again.

    @contextmanager
    def _taken_off(self) -> Iterator[None]:
        """Within it, the model is the plain checkpoint; afterwards all is as it was."""
        point = self._point()
        self.restore()
        try:
            yield
        finally:
            self._adapt()
            for kind, group in self._storage.groups.items():
                self.trainable[kind] = group
            self._go_to(*point)

    def _point(self) -> tuple[int, Tensor, Tensor]:
        """Tier, trainables and what they count from."""
        tier = next(i for i, own in enumerate(self.tiers) if own is self.segments)
        return tier, self._storage.flat.clone(), self.get_extra_state()

    @torch.no_grad()
    def _go_to(self, tier: int, flat: Tensor, origins: Tensor) -> None:
        self.use_tier(tier)
        self._storage.flat.copy_(flat)
        self.set_extra_state(origins)

    def _take_layout(self, segments: tuple[Segment, ...]) -> None:
        self.segments = segments
        self.num_values = sum(segment.size for segment in segments)
        self._as_they_lie, self._own_way = places_of(self._pet_modules)


_DTYPES = (torch.float32, torch.float64)


def _check_dtypes(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dtype not in _DTYPES:
            raise _wrong_dtype(f"the backbone's parameter {name!r}", parameter.dtype)


def _wrong_dtype(what: str, dtype: torch.dtype) -> BackboneError:
    return BackboneError(
        f"parameters must be float32, and {what} is {dtype}. Load the model with "
        "dtype=torch.float32; use autocast for half-precision passes."
    )
