"""The model a client trains: backbone, mask and structure in one, values in and out.

    backbone -> mask -> structure -> search -> [model] -> codec -> plan -> client -> strategy -> ledger -> report

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
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedpet.errors import BackboneError, StructureError
from fedpet.modules.adapter import LowRankAdapter
from fedpet.modules.base import PetModule, is_transposed
from fedpet.modules.bitfit import BitFit, NormBias
from fedpet.modules.head import HeadTensor
from fedpet.modules.hiwi import HiwiBias, HiwiWeight
from fedpet.modules.kept import activation_forward, norm_forward
from fedpet.modules.lnfit import LNFit
from fedpet.modules.lora import LoRA, LoRAFactors
from fedpet.modules.masked import MaskedWeight, masked_linear
from fedpet.positions import find_positions
from fedpet.structure import ModuleSpec, Structure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fedpet.backbone import Backbone
    from fedpet.mask import Mask

__all__ = ["PetModel", "Segment"]


@dataclass(frozen=True)
class Segment:
    """One stretch of the communicated values."""

    kind: str  # "mask", "head", or the kind of a structure's module
    name: str  # of the parameter (mask, head) or of the module's target
    start: int
    size: int


@dataclass
class _Site:
    """A module of the backbone with what acts on it."""

    name: str
    module: nn.Module
    mask: MaskedWeight | None = None
    effects: list[PetModule] = field(default_factory=list)
    marks: Callable[..., Any] | None = None  # wraps a forward whose output can be made again
    columns: bool = False  # an activation follows that takes columns, see fedpet.modules.kept


class PetModel:
    """A backbone with a mask and a structure on it.

    Laws: merged outputs equal adapted ones (1); what no module names stays bit-identical (2);
    values are linear in the model for every exact module (3); `load_values` forgets what was
    loaded before; `values()` right after it gives back the same bits.
    """

    model: PreTrainedModel
    segments: tuple[Segment, ...]
    num_values: int

    def __init__(
        self, backbone: Backbone, mask: Mask | None, structure: Structure, *, seed: int
    ) -> None:
        """Adapt `backbone.model` in place, at the point where all values are zero.

        Args:
            backbone: Its model must be float32 (float64 passes, for tests of gradients).
            mask: Which entries of which weights may move; None for none.
            structure: Which small modules act, and where.
            seed: Of the frozen down-projections, which every device must draw alike, and of the
                first start of the adapters on biases.

        Raises:
            BackboneError: Parameters of another type.
            StructureError: A target that is absent or cannot carry the kind of module.
        """
        self.model = backbone.model
        parameters = dict(self.model.named_parameters())
        like = next(iter(parameters.values()))
        for name, parameter in parameters.items():
            if parameter.dtype not in (torch.float32, torch.float64):
                raise BackboneError(
                    f"the backbone's parameters must be float32, {name!r} is {parameter.dtype}. "
                    "Load it with dtype=torch.float32; use autocast for half-precision passes."
                )
        self._masks = _build_masks(self.model, parameters, mask)
        self._structure = _build_structure(self.model, backbone.head, structure, seed)
        heads = [HeadTensor(name, parameters[name]) for name in backbone.head]
        self._modules: list[PetModule] = [*self._masks, *self._structure, *heads]
        self._gates: Tensor | None = None
        self._sites = _sites(self.model, backbone.head, self._masks, self._structure)
        self._allocate(like)
        self._hold()
        self._install()
        segments, start = [], 0
        for module in self._modules:
            if module.num_values:
                segments.append(Segment(module.kind, module.target, start, module.num_values))
                start += module.num_values
        self.segments = tuple(segments)
        self.num_values = start
        self.load_values(torch.zeros(start), seed=seed)

    # What the optimiser and the training loop see.

    def parameter_groups(self) -> dict[str, nn.Parameter]:
        """The trainables by kind of module, each one flat parameter with its gradient in place."""
        return dict(self._groups)

    def zero_grad(self) -> None:
        """Set all gradients to zero. Use this, not the optimiser's: gradients must stay in place."""
        self._gradient.zero_()

    @torch.no_grad()
    def after_step(self) -> None:
        """Write pretrained + change where the model computes with it. Call after every step."""
        start, stop = self._held_range
        torch.add(self._held_start, self._flat[start:stop], out=self._held)
        for mask in self._masks:
            mask.write_weight()

    # What is communicated.

    @torch.no_grad()
    def values(self) -> Tensor:
        """What is sent: float32, (num_values,), on the CPU, a copy; zeros are the checkpoint."""
        pieces = [module.read() for module in self._modules if module.num_values]
        flat = torch.cat(pieces) if pieces else torch.empty(0)
        return flat.to(device="cpu", dtype=torch.float32, copy=False)

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
        start = 0
        for module in self._modules:
            stop = start + module.num_values
            if not (isinstance(module, HiwiBias) and module.carried):
                module.write(values[start:stop], seed)
            if isinstance(module, BitFit) and module.adapter is not None:
                module.adapter.write(values[start:stop], seed)
            start = stop
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
            target = plain.get_submodule(site.name)
            target.__dict__.pop("forward", None)
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
            gates: (number of modules of the structure,), which may require a gradient; None
                takes the gates off, which is not the same computation as gates of 1 but the
                same result.
        """
        if gates is not None and gates.shape != (len(self._structure),):
            raise ValueError(
                f"gates must be one a module of the structure, ({len(self._structure)},), got "
                f"{tuple(gates.shape)}."
            )
        switched = (gates is None) != (self._gates is None)
        self._gates = gates
        for i, module in enumerate(self._structure):
            module.gate = None if gates is None else gates[i]
        if switched:
            self._install()

    @torch.no_grad()
    def restore(self) -> None:
        """Take everything off: the backbone is the checkpoint again, this object is done."""
        self._remove()
        for mask in self._masks:
            mask.restore()
        self._held.copy_(self._held_start)
        for parameter in self._held_parameters:
            parameter.data = parameter.data.clone()
            parameter.grad = None
            parameter.requires_grad_(False)

    # Set-up.

    def _allocate(self, like: Tensor) -> None:
        """One flat storage: a stretch a kind, the held kinds together."""
        kinds = list(dict.fromkeys(m.kind for m in self._modules))
        holds = {m.kind: self._is_held(m) for m in self._modules}
        ordered = sorted(kinds, key=lambda kind: holds[kind])  # stable
        total = sum(math.prod(shape) for m in self._modules for shape in m.shapes)
        dtype, device = like.dtype, like.device
        self._flat = torch.zeros(total, dtype=dtype, device=device)
        self._gradient = torch.zeros(total, dtype=dtype, device=device)
        self._groups: dict[str, nn.Parameter] = {}
        groups = {}
        held_start, start = total, 0
        for kind in ordered:
            first = start
            for module in (m for m in self._modules if m.kind == kind):
                if self._is_held(module):
                    held_start = min(held_start, start)
                trainables = []
                for shape in module.shapes:
                    stop = start + math.prod(shape)
                    trainables.append(self._view(start, stop, shape))
                    start = stop
                module.bind(trainables)
            groups[kind] = self._view(first, start, (start - first,))
        self._held_range = (held_start, total)
        self._groups = {kind: groups[kind] for kind in kinds}

    def _view(self, start: int, stop: int, shape: Sequence[int]) -> nn.Parameter:
        view = nn.Parameter(self._flat[start:stop].view(*shape))
        view.grad = self._gradient[start:stop].view(*shape)
        return view

    def _is_held(self, module: PetModule) -> bool:
        return module.held

    def _hold(self) -> None:
        """Put the model's own parameters of the held modules into one storage, with gradients."""
        start, stop = self._held_range
        self._held = torch.zeros_like(self._flat[start:stop])
        self._held_parameters: list[nn.Parameter] = []
        self._held_pretrained: dict[int, Tensor] = {}
        offset = 0
        with torch.no_grad():
            for module in sorted(
                (m for m in self._modules if self._is_held(m)),
                key=lambda m: m.trainables[0].storage_offset(),
            ):
                trainable = module.trainables[0]
                view = self._held[offset : offset + trainable.numel()].view(trainable.shape)
                parameter = self._parameter_of(module)
                if parameter is not None:
                    view.copy_(parameter)
                    parameter.data = view
                    parameter.requires_grad_(True)
                    parameter.grad = trainable.grad
                    self._held_parameters.append(parameter)
                offset += trainable.numel()
        self._held_start = self._held.clone()

    def _parameter_of(self, module: PetModule) -> nn.Parameter | None:
        if module.place == "tensor":
            return self.model.get_parameter(module.target)
        owner = self.model.get_submodule(module.target)
        parameter = getattr(owner, module.place, None)
        return parameter if isinstance(parameter, nn.Parameter) else None

    def _pretrained_of(self, module: PetModule) -> Tensor | None:
        parameter = self._parameter_of(module)
        if parameter is None:
            return None
        start = self._held_range[0]
        trainable = module.trainables[0]
        offset = trainable.storage_offset() - start
        return self._held_start[offset : offset + trainable.numel()].view(trainable.shape)

    def _install(self) -> None:
        """Give each site the forward it needs, or none."""
        self._remove()
        for site in self._sites:
            forward = self._forward_of(site)
            if forward is not None:
                site.module.forward = forward
            if site.marks is not None:
                plain = site.module.forward if forward else type(site.module).forward.__get__(site.module)
                site.module.forward = site.marks(plain)

    def _remove(self) -> None:
        for site in self._sites:
            site.module.__dict__.pop("forward", None)

    def _forward_of(self, site: _Site) -> Callable[..., Any] | None:
        module, mask = site.module, site.mask
        gated = self._gates is not None
        # (tensor's name, its pretrained value or None for "the parameter as it is", effects)
        tensors: dict[str, list[PetModule]] = {}
        bases: dict[str, Tensor | None] = {}
        for effect in site.effects:
            if effect.place not in ("weight", "bias"):
                continue
            parameter = getattr(module, effect.place, None)
            if effect.held and parameter is not None:
                if not gated:
                    continue  # the parameter holds it
                bases[effect.place] = self._pretrained_of(effect)
            tensors.setdefault(effect.place, []).append(effect)
        parallel = [e for e in site.effects if e.place == "parallel"]
        sequential = [e for e in site.effects if e.place == "sequential"]
        if not (mask or tensors or parallel or sequential):
            return None

        own = module._parameters
        plain = type(module).forward.__get__(module)
        dense = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        transposed = dense and is_transposed(module)
        v = mask.trainables[0] if mask is not None else None
        columns = site.columns
        bias_effects = tensors.pop("bias", [])
        bias_base = bases.pop("bias", None)

        def bias_of() -> Tensor | None:
            bias = own.get("bias") if bias_base is None else bias_base
            for effect in bias_effects:
                change = _gated(effect, effect.effect(bias))  # type: ignore[arg-type]
                bias = change if bias is None else bias + change
            return bias

        def dense_forward(x: Tensor) -> Tensor:
            weight = module.weight
            bias = bias_of() if bias_effects else own["bias"]
            if mask is not None:
                y = masked_linear(x, weight, bias, v, mask, columns)
            else:
                y = nn.functional.linear(x, weight.T if transposed else weight, bias)  # type: ignore
            for effect in parallel:
                y = y + _gated(effect, effect.effect(x))
            for effect in sequential:
                y = y + _gated(effect, effect.effect(y))
            return y

        if dense:
            return dense_forward

        def norm_forward(*args: Any, **kwargs: Any) -> Any:
            held = {}
            for name, effects in tensors.items():
                tensor = bases[name]
                for effect in effects:
                    tensor = tensor + _gated(effect, effect.effect(tensor))  # type: ignore
                held[name], own[name] = own[name], tensor  # type: ignore
            extra = None
            if bias_effects:
                if "bias" in own and own["bias"] is not None:
                    held["bias"], own["bias"] = own["bias"], bias_of()  # type: ignore
                else:
                    extra = bias_of()
            try:
                output = plain(*args, **kwargs)
            finally:
                own.update(held)  # type: ignore
            if extra is not None:
                output = output + extra
            for effect in sequential:
                if isinstance(output, tuple):
                    h = output[0]
                    output = (h + _gated(effect, effect.effect(h)), *output[1:])
                else:
                    output = output + _gated(effect, effect.effect(output))
            return output

        return norm_forward


def _gated(effect: PetModule, change: Tensor) -> Tensor:
    return change if effect.gate is None else effect.gate * change


def _build_masks(
    model: nn.Module, parameters: dict[str, nn.Parameter], mask: Mask | None
) -> list[MaskedWeight]:
    if mask is None:
        return []
    unknown = [name for name in mask.positions if name not in parameters]
    if unknown:
        raise StructureError(
            f"the mask names the weight {unknown[0]!r}, which this backbone has not. Build the "
            "mask from this backbone."
        )
    owners: dict[int, nn.Module] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            owners.setdefault(id(weight), module)
    masks = []
    for name, parameter in parameters.items():
        positions = mask.positions.get(name)
        if positions is not None and len(positions):
            owner = owners.get(id(parameter))
            if owner is None or parameter.dim() != 2:
                raise StructureError(
                    f"the mask names {name!r}, which is no weight of a dense layer."
                )
            masks.append(MaskedWeight(name, parameter, positions, is_transposed(owner)))
    return masks


def _build_structure(
    model: nn.Module, head: Sequence[str], structure: Structure, seed: int
) -> list[PetModule]:
    positions = {}
    for position in find_positions(model, head):
        positions.setdefault(position.name, set()).add(position.kind)
    modules: list[PetModule] = []
    for spec in structure.modules:
        kinds = positions.get(spec.target)
        if kinds is None:
            raise StructureError(
                f"the structure's {spec.kind!r} module acts on {spec.target!r}, which is no "
                "position of this backbone. It was made for another one."
            )
        if not kinds & _CARRIERS[spec.kind]:
            raise StructureError(
                f"a {spec.kind!r} module acts on {' or '.join(sorted(_CARRIERS[spec.kind]))}, "
                f"and {spec.target!r} is a {' and '.join(sorted(kinds))}."
            )
        modules.append(_build(spec, model, seed))
    carriers = {m.target: m for m in modules if isinstance(m, BitFit)}
    for module in modules:
        if isinstance(module, HiwiBias) and module.target in carriers:
            module.carried = True
            carriers[module.target].adapter = module
    return modules


_DENSE = {"linear", "conv1d"}
_CARRIERS = {
    "bitfit": _DENSE | {"norm"},
    "lnfit": {"norm"},
    "ln-bias": {"norm"},
    "lora": _DENSE,
    "lora-factors": _DENSE,
    "hiwi-bias": _DENSE,
    "hiwi-weight": _DENSE,
    "lowrank-adapter": {"block"},
}


def _build(spec: ModuleSpec, model: nn.Module, seed: int) -> PetModule:
    module, target, rank, scale = (
        model.get_submodule(spec.target),
        spec.target,
        spec.rank,
        spec.scale,
    )
    if spec.kind == "bitfit":
        return BitFit(target, module)
    if spec.kind == "ln-bias":
        return NormBias(target, module)
    if spec.kind == "lnfit":
        return LNFit(target, module)
    if spec.kind == "lora":
        return LoRA(target, module, rank, scale, seed)
    if spec.kind == "lora-factors":
        return LoRAFactors(target, module, rank, scale, seed)
    if spec.kind == "hiwi-bias":
        return HiwiBias(target, module, rank, scale)
    if spec.kind == "hiwi-weight":
        return HiwiWeight(target, module, rank, scale, seed)
    like = next(p for p in model.parameters())
    width = _output_width(module)
    return LowRankAdapter(target, like, width, rank, scale, seed)


def _output_width(module: nn.Module) -> int:
    """Width of a block's output: of its last dense module that gives the hidden size back."""
    from fedpet.modules.lora import dense_sizes

    dense = [
        m for m in module.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"
    ]
    return dense_sizes(dense[-1])[1]


def _sites(
    model: nn.Module,
    head: Sequence[str],
    masks: Sequence[MaskedWeight],
    structure: Sequence[PetModule],
) -> list[_Site]:
    """Modules that something acts on, and those whose output a masked layer need not keep."""
    by_weight = {id(mask.weight): mask for mask in masks}
    by_target: dict[str, list[PetModule]] = {}
    for module in structure:
        by_target.setdefault(module.target, []).append(module)
    positions = find_positions(model, head) if masks else ()
    norms = {p.name for p in positions if p.kind == "norm"}
    activations = {p.name: (p.stack, p.layer) for p in positions if p.kind == "activation"}
    with_activation = set(activations.values())
    inner = {
        p.name
        for p in positions
        if p.role in ("ffn-up", "ffn-gate") and (p.stack, p.layer) in with_activation
    }
    sites = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        mask = by_weight.get(id(weight)) if _is_dense(module) else None
        effects = by_target.get(name, [])
        marks = norm_forward if name in norms else None
        marks = activation_forward if name in activations else marks
        if mask is not None or effects or marks is not None:
            sites.append(_Site(name, module, mask, effects, marks, name in inner))
    return sites


def _is_dense(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
