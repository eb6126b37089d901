"""Lay all trainables in one tensor, and all their gradients in another.

In:  a model and the PET modules on it.
Out: each module's trainables as views; for the optimiser, one parameter a kind of module; a hook
     that writes pretrained + change into the model before a forward pass, where a step moved it.

A change of a tensor's own shape (a bias, a gain, a head) is a *leaf*: the model's parameter is
pretrained + change, a view of a third tensor that mirrors the end of the first, and the autograd
leaf, whose gradient lies where the optimiser looks for the trainable's.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fedpet.pet.modules.base import PetModule, value_dtype
from fedpet.pet.modules.masked_weight import MaskedWeights

__all__ = ["FlatParameters", "is_adapted", "trainables_of", "unpin"]

_GRAD: Any = torch.Tensor.grad  # the attribute itself, below the property of `_Pinned`


@dataclass
class _Reads:
    """Remember that a gradient was read since the model was written."""

    seen: bool = False


class _Pinned:
    """A parameter whose gradient stays a view of the flat one, into which backward passes write.

    `optimizer.zero_grad()` and `module.zero_grad()` set gradients to None: here that fills the
    view with zeros. A gradient that is assigned is copied into it. And a read is remembered: any
    optimiser reads a gradient before it moves a parameter, and some leave no other trace (fused
    ones do not count `_version` up).
    """

    _reads: _Reads
    _plain: type[nn.Parameter]

    @property
    def grad(self) -> Tensor | None:
        self._reads.seen = True
        own: Tensor | None = _GRAD.__get__(self)
        return own

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        own = _GRAD.__get__(self)
        if value is None:
            own.zero_()
        elif value is not own:
            own.copy_(value.detach())

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """Copy as a plain parameter: nothing is written into it."""
        own = cast(nn.Parameter, self)
        copied = nn.Parameter(own.data.clone(), own.requires_grad)
        memo[id(self)] = copied
        return copied


@functools.cache
def _pinned(plain: type[nn.Parameter]) -> type[nn.Parameter]:
    """Make the class of pinned parameters that are otherwise like `plain`, a kind of tensor."""
    own = {"_plain": plain, "__torch_function__": torch._C._disabled_torch_function_impl}
    metaclass: Any = type(plain)
    made: type[nn.Parameter] = metaclass(f"Pinned{plain.__name__}", (_Pinned, plain), own)
    return made


def _pin(parameter: nn.Parameter, gradient: Tensor, reads: _Reads) -> None:
    """Fix its gradient, as torch's lazy parameters change their class when they are made."""
    if not isinstance(parameter, _Pinned):
        parameter.__class__ = _pinned(type(parameter))
    _GRAD.__set__(parameter, None)
    _GRAD.__set__(parameter, gradient)
    cast(Any, parameter)._reads = reads


def unpin(parameter: nn.Parameter) -> None:
    """Make it a plain parameter again, frozen and without a gradient."""
    if isinstance(parameter, _Pinned):
        cast(Any, parameter).__class__ = parameter._plain
    parameter.grad = None
    parameter.requires_grad_(False)


class FlatParameters:
    """The trainables of PET modules, bound to them.

    Attributes:
        flat: All trainables, (n,): a stretch for each kind, those of leaf kinds at the end.
        gradient: Theirs, (n,).
        groups: By kind, in the modules' order: its stretch as a parameter, its gradient in place.
        plain_dtypes: Of the parameters that hold a change, by name, in the plain model: here those
            of a bfloat16 model are float32.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Sequence[PetModule],
        groups: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        """Lay out the trainables and bind them.

        Args:
            model: The modules act on it.
            modules: In the order of their values.
            groups: Of an earlier storage of the same modules, for an optimiser that has them.
        """
        self._modules = modules
        self._masks = [module for module in modules if isinstance(module, MaskedWeights)]
        like = next(model.parameters())
        kinds = list(dict.fromkeys(module.kind for module in modules))
        as_leaf = {module.kind: module.as_leaf for module in modules}
        sizes = dict.fromkeys(sorted(kinds, key=lambda kind: as_leaf[kind]), 0)
        for module in modules:
            sizes[module.kind] += sum(math.prod(shape) for shape in module.shapes)
        dtype = value_dtype(like.dtype)
        self.flat = torch.zeros(sum(sizes.values()), dtype=dtype, device=like.device)
        self.gradient = torch.zeros_like(self.flat)
        self._first = dict(zip(sizes, itertools.accumulate([0, *sizes.values()]), strict=False))
        self._leaves_from = min(
            (first for kind, first in self._first.items() if as_leaf[kind]), default=len(self.flat)
        )
        self._reads = _Reads()
        self._version = 0
        self.groups: dict[str, nn.Parameter] = dict(groups or {})
        for kind in kinds:
            self.bind(kind)
        self._make_leaves(model)

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
        data, gradient = self.flat[first:start], self.gradient[first:start]
        group = self.groups.get(kind)
        # As nn.Module.to does it: the parameter stays where its kind of tensor can lie there.
        if group is not None and torch._has_compatible_shallow_copy_type(group, data):
            _GRAD.__set__(group, None)  # of another size, maybe
            group.data = data
        else:
            self.groups[kind] = nn.Parameter(data)
        _pin(self.groups[kind], gradient, self._reads)

    @torch.no_grad()
    def write(self) -> None:
        """Write pretrained + change where the model computes with it."""
        torch.add(self._pretrained, self.flat[self._leaves_from :], out=self._leaves)
        for mask in self._masks:
            mask.write_weights()
        self._note_written()

    @torch.no_grad()
    def refresh(self) -> None:
        """Write where a trainable may have moved since, and did.

        Numbers that are there already are not written again: an earlier pass whose backward is
        still to come may have kept the tensor.
        """
        if self._reads.seen or self._versions() != self._version:
            now = self._pretrained + self.flat[self._leaves_from :]
            if torch.equal(now, self._leaves) and all(mask.is_written() for mask in self._masks):
                self._note_written()
            else:
                self.write()

    def hook(self, model: nn.Module) -> RemovableHandle:
        """Have the model refreshed before each of its forward passes."""
        return model.register_forward_pre_hook(self._before_forward)

    def _before_forward(self, module: nn.Module, inputs: object) -> None:
        if self._reads.seen or self._versions() != self._version:
            self.refresh()

    @torch.no_grad()
    def release(self, *, merged: bool = False) -> None:
        """Give the parameters that hold a change memory of their own, frozen.

        Args:
            merged: They keep the change; without it they get their pretrained numbers back.
        """
        if not merged:
            self._leaves.copy_(self._pretrained)
        for parameter, dtype in zip(self._leaf_parameters, self.plain_dtypes.values(), strict=True):
            unpin(parameter)
            parameter.data = parameter.data.to(dtype, copy=True)

    def _view(self, start: int, shape: Sequence[int]) -> nn.Parameter:
        stop = start + math.prod(shape)
        view = nn.Parameter(self.flat[start:stop].view(*shape))
        view.grad = self.gradient[start:stop].view(*shape)
        return view

    @torch.no_grad()
    def _make_leaves(self, model: nn.Module) -> None:
        """Make the parameters of leaf modules views of one storage, and leaves."""
        self._leaves = torch.zeros_like(self.flat[self._leaves_from :])
        self._pretrained = torch.zeros_like(self._leaves)
        self._leaf_parameters: list[nn.Parameter] = []
        self.plain_dtypes: dict[str, torch.dtype] = {}
        for module in self._modules:
            parameter = _parameter_of(module, model) if module.as_leaf else None
            if parameter is None:
                continue
            trainable = module.trainables[0]
            start = trainable.storage_offset() - self._leaves_from
            here = slice(start, start + trainable.numel())
            module.pretrained = self._pretrained[here].view(trainable.shape)
            module.pretrained.copy_(parameter)
            dtype = parameter.dtype
            parameter.data = self._leaves[here].view(trainable.shape).copy_(parameter)
            parameter.requires_grad_(True)
            assert trainable.grad is not None
            _pin(parameter, trainable.grad, self._reads)
            self._leaf_parameters.append(parameter)
            self.plain_dtypes[_parameter_name(module)] = dtype

    def _versions(self) -> int:
        """Return a number that grows with each change in place that torch counts."""
        return self.flat._version + sum(group._version for group in self.groups.values())

    def _note_written(self) -> None:
        self._version, self._reads.seen = self._versions(), False


def is_adapted(model: nn.Module) -> bool:
    """Tell whether a storage has some of this model's parameters."""
    return _storage_of(model) is not None


def trainables_of(model: nn.Module) -> list[nn.Parameter]:
    """Return what an optimiser moves: a storage's groups, or the parameters that ask for it."""
    storage = _storage_of(model)
    if storage is not None:
        return list(storage.groups.values())
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _storage_of(model: nn.Module) -> FlatParameters | None:
    owners = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, FlatParameters)), None)


def _parameter_of(module: PetModule, model: nn.Module) -> nn.Parameter | None:
    """Return the parameter that a leaf module changes; None where the model has none of it."""
    if module.place == "tensor":
        return model.get_parameter(module.target)
    parameter: Tensor | None = getattr(model.get_submodule(module.target), module.place, None)
    return parameter if isinstance(parameter, nn.Parameter) else None


def _parameter_name(module: PetModule) -> str:
    return module.target if module.place == "tensor" else f"{module.target}.{module.place}"
