"""Install one forward for a module of the backbone and everything that acts on it: a site.

In:  a module, the mask of its weight, the PET modules whose target it is.
Out: a `forward` on the instance that computes them together, or none where the plain one does.

Names, classes and the module tree stay as they are: an attribute of the instance stands before
the method of the class, and taking it off gives the plain module back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedpet.backbone.module_roles import Position
from fedpet.backbone.quantised import QuantisedWeight
from fedpet.pet.kernels.input_recompute import activation_forward, norm_forward
from fedpet.pet.kernels.matmul import Product, torch_matmul
from fedpet.pet.layers.mixed_precision import widened
from fedpet.pet.layers.per_head_linear import PerHeadLinear
from fedpet.pet.layers.sparse_grad_linear import LinearSpec, dense
from fedpet.pet.modules.base import GatedModule, is_dense, is_transposed
from fedpet.pet.modules.lora import LowRankBranch
from fedpet.pet.modules.masked_weight import MaskedWeight

__all__ = ["Site", "build_sites"]

Forward = Callable[..., Any]


@dataclass
class Site:
    """One module and what acts on it."""

    name: str
    module: nn.Module
    mask: MaskedWeight | None = None
    effects: list[GatedModule] = field(default_factory=list)
    marks: Callable[[Forward], Forward] | None = None  # for `input_recompute`
    columns: bool = False  # lays its output in columns, for an activation that takes them
    product: Product = torch_matmul
    dtype: torch.dtype = torch.float32  # of the model's frozen weights

    def __post_init__(self) -> None:
        self._before: Forward | None = self.module.__dict__.get("forward")

    def install(self, gated: bool) -> None:
        """Give the module the forward it needs.

        Args:
            gated: Whether effects are multiplied by gates; a leaf tensor then stays out of the
                forward pass, and its change is added to the pretrained one.
        """
        self.remove()
        forward = self._forward(gated)
        if self.marks is not None:
            forward = self.marks(forward or self._plain())
        if forward is not None:
            self.module.forward = forward

    def remove(self) -> None:
        """Give the module its own forward back."""
        self.module.__dict__.pop("forward", None)
        if self._before is not None:
            self.module.forward = self._before

    def _plain(self) -> Forward:
        forward: Forward = self._before or type(self.module).forward.__get__(self.module)
        return forward

    def _forward(self, gated: bool) -> Forward | None:
        tensors: dict[str, list[GatedModule]] = {}
        for effect in self.effects:
            if effect.place in ("weight", "bias"):
                in_the_model = effect.as_leaf and effect.pretrained is not None
                if gated or not in_the_model:
                    tensors.setdefault(effect.place, []).append(effect)
        parallel = [effect for effect in self.effects if effect.place == "parallel"]
        sequential = [effect for effect in self.effects if effect.place == "sequential"]
        mask = self.mask if self.mask is not None and self.mask.num_values else None
        acted_on = bool(mask or tensors or parallel or sequential)
        if is_dense(self.module):
            elsewhere = self.is_quantised or self._product() is not torch_matmul
            if acted_on or self._is_mixed() or elsewhere:
                return self._dense(gated, mask, tensors.get("bias", []), parallel, sequential)
        elif acted_on:
            return self._other(tensors, sequential)
        elif self._is_mixed():
            return widened(self._plain(), self.module)
        return None

    @property
    def is_quantised(self) -> bool:
        """True if its weight is: a pass reads it, and keeps no plain copy for the one backwards."""
        return isinstance(self.module._parameters.get("weight"), QuantisedWeight)

    def _is_mixed(self) -> bool:
        """Tell whether it has float32 tensors in a model of bfloat16."""
        own = [tensor for tensor in self.module._parameters.values() if tensor is not None]
        return any(tensor.dtype != self.dtype for tensor in own)

    def _product(self) -> Product:
        """Take torch's own where the whole weight is trained, as of a head: autograd sees it."""
        weight = self.module._parameters["weight"]
        assert weight is not None
        return torch_matmul if weight.requires_grad else self.product

    def _dense(
        self,
        gated: bool,
        mask: MaskedWeight | None,
        biases: Sequence[GatedModule],
        parallel: Sequence[GatedModule],
        sequential: Sequence[GatedModule],
    ) -> Forward:
        own = self.module._parameters
        weight = own["weight"]
        assert weight is not None
        branches = [e for e in parallel if isinstance(e, LowRankBranch) and e.fused]
        others = [e for e in parallel if e not in branches]
        # With gates, gradients may be asked for apart; without, they go where they belong.
        if mask is not None:
            mask.in_place = not gated
        for branch in branches:
            branch.in_place = not gated
        product, is_quantised = self._product(), self.is_quantised
        plan = LinearSpec(is_transposed(self.module), mask, branches, self.columns, product)
        constant = plan.trainables if mask is None or mask.gates is None else None

        def bias_now() -> Tensor | None:
            return _changed(own["bias"], biases) if biases else own["bias"]

        def forward(x: Tensor) -> Tensor:
            bias = bias_now()
            trainables = constant if constant is not None else plan.trainables
            if trainables or product is not torch_matmul or is_quantised:
                y = dense(x, weight, bias, plan, trainables)
            else:
                x = x.to(weight.dtype)  # float32 of a head, whose output stays so
                bias = bias if bias is None else bias.to(x.dtype)
                y = nn.functional.linear(x, plan.matrix(weight), bias)
            for effect in others:
                y = effect.added(y, x)
            for effect in sequential:
                y = effect.added(y, y)
            return y

        low_rank = [effect for effect in parallel if isinstance(effect, LowRankBranch)]
        if len(low_rank) == len(parallel) and not sequential and not plan.transposed:
            forward.by_heads = PerHeadLinear(weight, bias_now, mask, low_rank)  # type: ignore[attr-defined]
        return forward

    def _other(
        self, tensors: dict[str, list[GatedModule]], sequential: Sequence[GatedModule]
    ) -> Forward:
        """Return the forward of a norm or a block, with changed tensors and more after it."""
        own: dict[str, Any] = self.module._parameters
        plain = widened(self._plain(), self.module) if self._is_mixed() else self._plain()
        replaced = {name: effects for name, effects in tensors.items() if own.get(name) is not None}
        added = [e for name, effects in tensors.items() if name not in replaced for e in effects]

        def forward(*args: Any, **kwargs: Any) -> Any:
            before = {name: own[name] for name in replaced}
            try:
                for name, effects in replaced.items():
                    own[name] = _changed(before[name], effects)
                output = plain(*args, **kwargs)
            finally:
                own.update(before)
            for effect in added:
                output = output + effect.gated(None).to(output.dtype)
            for effect in sequential:
                if isinstance(output, tuple):
                    output = (output[0] + effect.gated(output[0]), *output[1:])
                else:
                    output = output + effect.gated(output)
            return output

        return forward


def build_sites(
    model: nn.Module,
    positions: Sequence[Position],
    masks: Sequence[MaskedWeight],
    structure: Sequence[GatedModule],
    product: Product,
    heads: Sequence[str] = (),
) -> list[Site]:
    """Build a site for each module that something acts on, or whose output is recomputed.

    All dense ones too, where their products are not torch's or their weights are quantised; and
    those with a parameter of `heads`, the trained ones of the head, in a bfloat16 model.
    """
    dtype = next(model.parameters()).dtype
    owners = {name.rpartition(".")[0] for name in heads} if dtype.itemsize < 4 else ()
    by_weight = {id(mask.weight): mask for mask in masks}
    by_target: dict[str, list[GatedModule]] = {}
    for module in structure:
        by_target.setdefault(module.target, []).append(module)
    marked = positions if masks else ()
    norms = {p.name for p in marked if p.kind == "norm"}
    activations = {p.name: (p.stack, p.layer) for p in marked if p.kind == "activation"}
    layers = set(activations.values())
    inner = {
        p.name for p in marked if p.role in ("ffn-up", "ffn-gate") and (p.stack, p.layer) in layers
    }
    sites = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        multiplies = is_dense(module)
        mask = by_weight.get(id(weight)) if multiplies else None
        marks = activation_forward if name in activations else None
        marks = norm_forward if name in norms else marks
        effects = by_target.get(name, [])
        site = Site(name, module, mask, effects, marks, name in inner, product, dtype)
        elsewhere = multiplies and (product is not torch_matmul or site.is_quantised)
        in_head = name in owners
        if mask is not None or site.effects or marks is not None or elsewhere or in_head:
            sites.append(site)
    return sites


def _changed(tensor: Tensor | None, effects: Sequence[GatedModule]) -> Tensor | None:
    """Add changes to a tensor: to the pretrained one where a leaf module is gated."""
    for effect in effects:
        if effect.as_leaf and effect.pretrained is not None:
            tensor = effect.pretrained
    for effect in effects:
        change = effect.gated(None)
        tensor = change if tensor is None else tensor + change
    return tensor
