"""Define the interface of all PET modules: a small change to one named tensor or module.

In:  the module of the backbone it acts on, and views of the flat storage of trainables.
Out: its effect in the forward pass, its communicated values, and its fold into a plain model.

A PET module has *trainables*, what the optimiser moves, and *values*, what is communicated. They
are the same numbers for most kinds; a HiWi adapter on a bias trains two matrices and sends one
vector. Values are always changes: where all are zero, the model is the checkpoint (the low-rank
adapter on hidden states, which starts from a seeded point, is the exception and says so).

`place` says what the effect D is added to, times the gate:

    "weight", "bias"   the target's tensor of this name: D() has the tensor's shape
    "parallel"         the target's output: D(input)
    "sequential"       the target's output, after the parallel ones: D(output)
    "mask", "tensor"   nothing in the forward pass: the tensor in the model is written after each
                       step, so the pass is that of the plain model
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fedpet.backbone.module_roles import is_dense
from fedpet.utils.seeds import derive_seed

if TYPE_CHECKING:
    from fedpet.pet.modules.registry import ModuleSpec

__all__ = [
    "GatedModule",
    "PetModule",
    "dense_sizes",
    "extend",
    "is_dense",
    "is_transposed",
    "kaiming_uniform",
    "output_width",
    "seeded",
    "value_dtype",
]


class PetModule(ABC):
    """One small change, its trainables, its values, its merge.

    Attributes:
        kind: As in a structure, or "mask", "head".
        target: Path of the module it acts on; of the parameter for "head"; the mask acts on many.
    """

    place: ClassVar[Literal["weight", "bias", "parallel", "sequential", "mask", "tensor"]]
    exact: ClassVar[bool] = True  # linear in its values: averaging them is averaging models
    # The change is the trainable itself, of the tensor's own shape: the model's parameter can
    # hold pretrained + change and be the autograd leaf, so the forward pass is left alone.
    as_leaf: ClassVar[bool] = False

    def __init__(self, kind: str, target: str) -> None:
        self.kind = kind
        self.target = target
        self.trainables: tuple[Tensor, ...] = ()
        self.pretrained: Tensor | None = None  # of a leaf module: the tensor in the checkpoint

    @property
    @abstractmethod
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of the trainables."""

    @property
    def num_values(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def parts(self) -> tuple[tuple[str, int], ...]:
        """Name the owners of the values, in their order, and count the values of each."""
        return ((self.target, self.num_values),)

    @property
    def added_parameters(self) -> tuple[str, ...]:
        """Name parameters that the merged model has and the pretrained one has not; () for most.

        A model that has some computes more than the pretrained one.
        """
        return ()

    def bind(self, trainables: Sequence[Tensor]) -> None:
        """Take the views of the flat storage that are this module's trainables from now on."""
        assert tuple(tuple(t.shape) for t in trainables) == self.shapes
        self.trainables = tuple(trainables)

    def write(self, values: Tensor, seed: int) -> None:
        """Set the trainables to the point `values` (num_values,); `seed` is of this work."""
        start = 0
        for trainable in self.trainables:
            stop = start + trainable.numel()
            trainable.detach().copy_(values[start:stop].view(trainable.shape))
            start = stop

    @property
    def sends_trainables(self) -> bool:
        """Tell whether the values are the trainables themselves, but for a constant."""
        return True

    def sent(self) -> Tensor:
        """Compute the communicated values, (num_values,), from the trainables, for autograd."""
        flat = [trainable.reshape(-1) for trainable in self.trainables]
        return flat[0] if len(flat) == 1 else torch.cat(flat)

    def read(self) -> Tensor:
        """Return the communicated values, (num_values,)."""
        return self.sent().detach()

    @property
    def origin(self) -> Tensor | None:
        """Return the point that trainables count from, where no checkpoint has it; or None."""
        return None

    def count_from(self, origin: Tensor) -> None:
        """Count from an `origin` of the same module elsewhere, under no_grad."""
        raise NotImplementedError(f"{type(self).__name__} has no origin")

    @abstractmethod
    def merge(self, module: nn.Module) -> None:
        """Fold the change into `module`, the target in a plain copy of the model, under no_grad."""


class GatedModule(PetModule):
    """A PET module that a structure names: it has an effect in the forward pass, and a gate."""

    def __init__(self, kind: str, target: str) -> None:
        super().__init__(kind, target)
        self.gate: Tensor | None = None  # scalar that multiplies the effect; None is 1

    @classmethod
    def build(cls, spec: ModuleSpec, module: nn.Module, seed: int) -> GatedModule:
        """Make the module that a structure names, to act on `module`.

        Args:
            spec: Its target, rank and scale.
            module: The target itself.
            seed: Of what every device must draw alike, see `seeded`.
        """
        raise NotImplementedError(f"{cls.__name__} is in no structure")

    @abstractmethod
    def effect(self, x: Tensor | None) -> Tensor:
        """Compute D; `x` is the input or the output, by `place`; None for "weight", "bias"."""

    def gated(self, x: Tensor | None) -> Tensor:
        """Compute D times the gate."""
        change = self.effect(x)
        return change if self.gate is None else self.gate * change

    def added(self, y: Tensor, x: Tensor) -> Tensor:
        """Compute y plus D times the gate, where D adds to an output."""
        return y + self.gated(x)


def value_dtype(weights: torch.dtype) -> torch.dtype:
    """Return the type of changes of weights of this type: float32, or float64 of such weights."""
    return torch.promote_types(weights, torch.float32)


def is_transposed(module: nn.Module) -> bool:
    """Tell whether a dense module's weight is (in, out), as in Conv1D, and not (out, in)."""
    return not isinstance(module, nn.Linear)


def dense_sizes(module: nn.Module) -> tuple[int, int]:
    """Return (in, out) of a dense module."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    first, second = weight.shape
    return (first, second) if is_transposed(module) else (second, first)


def output_width(block: nn.Module) -> int:
    """Return the width of a block's output: that of its last dense module."""
    return dense_sizes([inner for inner in block.modules() if is_dense(inner)][-1])[1]


def seeded(seed: int, target: str, what: str) -> torch.Generator:
    """Make the generator of one tensor of one module: every device draws the same from it."""
    return torch.Generator().manual_seed(derive_seed("module", seed, target, what))


def kaiming_uniform(
    shape: tuple[int, ...], fan_in: int, generator: torch.Generator, *, a: float = 0.0
) -> Tensor:
    """Draw Kaiming-uniform float32 on the CPU; `a` is the leaky ReLU's slope, sqrt 5 in LoRA."""
    bound = math.sqrt(6.0 / ((1.0 + a * a) * fan_in))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def extend(module: nn.Module, suffix: str, after: Callable[[nn.Module, Any], Any]) -> None:
    """Apply `after(module, output)` to a merged module's output: what cannot be folded in.

    The module becomes an instance of a subclass of its class, named with `suffix`.
    """
    plain = type(module)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return after(self, plain.forward(self, *args, **kwargs))

    names = {"__module__": plain.__module__, "forward": forward}
    module.__class__ = type(f"{plain.__name__}{suffix}", (plain,), names)
