"""All trainables in one tensor, all their gradients in another.

In:  a model and the PET modules on it.
Out: each module's trainables as views; for the optimiser, one parameter a kind of module.

A change of a tensor's own shape (a bias, a gain, a head) is *held*: the model's parameter is
pretrained + change, a view of a third tensor that mirrors the end of the first, and the autograd
leaf, whose gradient lies where the optimiser looks for the trainable's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedpet.modules.base import PetModule

__all__ = ["FlatStorage"]


class FlatStorage:
    """The trainables of PET modules, bound to them.

    Attributes:
        flat: All trainables, (n,): a stretch for each kind, those of held kinds at the end.
        gradient: Theirs, (n,).
        groups: By kind, in the modules' order: its stretch as a parameter, its gradient in place.
    """

    def __init__(self, model: nn.Module, modules: Sequence[PetModule]) -> None:
        self._modules = modules
        like = next(model.parameters())
        kinds = list(dict.fromkeys(module.kind for module in modules))
        held = {module.kind: module.held for module in modules}
        sizes = dict.fromkeys(sorted(kinds, key=lambda kind: held[kind]), 0)
        for module in modules:
            sizes[module.kind] += sum(math.prod(shape) for shape in module.shapes)
        self.flat = torch.zeros(sum(sizes.values()), dtype=like.dtype, device=like.device)
        self.gradient = torch.zeros_like(self.flat)
        self._first = dict(zip(sizes, itertools.accumulate([0, *sizes.values()]), strict=False))
        self._held_from = min(
            (first for kind, first in self._first.items() if held[kind]), default=len(self.flat)
        )
        self.groups: dict[str, nn.Parameter] = {}
        for kind in kinds:
            self.bind(kind)
        self._hold(model)

    def bind(self, kind: str) -> None:
        """Give the modules of a kind their views, in the shapes that they have now."""
        first = start = self._first[kind]
        for module in self._modules:
            if module.kind == kind:
                trainables = []
                for shape in module.shapes:
                    trainables.append(self._view(start, shape))
                    start += math.prod(shape)
                module.bind(trainables)
        self.groups[kind] = self._view(first, (start - first,))

    def write_held(self) -> None:
        """Write pretrained + change into the parameters that hold it, under no_grad."""
        torch.add(self._pretrained, self.flat[self._held_from :], out=self._held)

    def release(self) -> None:
        """Give those parameters their pretrained numbers and memory of their own, under no_grad."""
        self._held.copy_(self._pretrained)
        for parameter in self._holders:
            parameter.data = parameter.data.clone()
            parameter.grad = None
            parameter.requires_grad_(False)

    def _view(self, start: int, shape: Sequence[int]) -> nn.Parameter:
        stop = start + math.prod(shape)
        view = nn.Parameter(self.flat[start:stop].view(*shape))
        view.grad = self.gradient[start:stop].view(*shape)
        return view

    @torch.no_grad()
    def _hold(self, model: nn.Module) -> None:
        """Make the parameters of held modules views of one storage, and leaves."""
        self._held = torch.zeros_like(self.flat[self._held_from :])
        self._pretrained = torch.zeros_like(self._held)
        self._holders: list[nn.Parameter] = []
        for module in self._modules:
            parameter = _parameter_of(module, model) if module.held else None
            if parameter is None:
                continue
            trainable = module.trainables[0]
            start = trainable.storage_offset() - self._held_from
            here = slice(start, start + trainable.numel())
            module.pretrained = self._pretrained[here].view(trainable.shape)
            module.pretrained.copy_(parameter)
            parameter.data = self._held[here].view(trainable.shape).copy_(parameter)
            parameter.requires_grad_(True)
            parameter.grad = trainable.grad
            self._holders.append(parameter)


def _parameter_of(module: PetModule, model: nn.Module) -> nn.Parameter | None:
    """The parameter that a held module changes; None where the model has none of it."""
    if module.place == "tensor":
        return model.get_parameter(module.target)
    parameter: Tensor | None = getattr(model.get_submodule(module.target), module.place, None)
    return parameter if isinstance(parameter, nn.Parameter) else None
