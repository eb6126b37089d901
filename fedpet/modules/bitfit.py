"""BitFit: a change of a bias.

In:  a Linear or a norm.
Out: a vector added to its output, values (d_out,).

Where the layer has no bias (T5, Llama) the vector is one: merging then leaves a parameter named
"bias" in the model, which `added_parameters` declares (law 1's exception).

Source: S3PET's form of BitFit (arXiv:2206.07382): b is zero at the start and added to the output
of Linear or LayerNorm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedpet.modules.base import PetModule, extend, fold, is_transposed
from fedpet.modules.hiwi import HiwiBias

__all__ = ["BitFit", "NormBias"]


class BitFit(PetModule):
    """A change of a bias, or a bias where there is none. Exact."""

    place = "bias"
    held = True

    def __init__(self, target: str, module: nn.Module, kind: str = "bitfit") -> None:
        super().__init__(kind, target)
        weight = module.weight
        assert isinstance(weight, Tensor)
        transposed = weight.dim() == 2 and is_transposed(module)
        self._shape = (weight.shape[1 if transposed else 0],)
        self._adds = getattr(module, "bias", None) is None
        self.adapter: HiwiBias | None = None  # on the same bias; its change is sent with this one

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return (self._shape,)

    @property
    def added_parameters(self) -> tuple[str, ...]:
        return (f"{self.target}.bias",) if self._adds else ()

    def effect(self, x: Tensor) -> Tensor:
        return self.trainables[0]

    def read(self) -> Tensor:
        values = super().read()
        return values if self.adapter is None else values + self.adapter.effect(values).detach()

    def merge(self, module: nn.Module) -> None:
        if not self._adds:
            return  # the model's bias holds it
        change = nn.Parameter(self.trainables[0].detach().clone(), requires_grad=False)
        if isinstance(module, nn.Linear):
            module.bias = change
            return
        module.register_parameter("bias", change)
        cls = extend(module, "WithBias")
        plain = cls.__mro__[1].forward

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return plain(self, *args, **kwargs) + self.bias

        cls.forward = forward


class NormBias(BitFit):
    """A change of a norm's bias. Exact."""

    def __init__(self, target: str, module: nn.Module) -> None:
        super().__init__(target, module, "ln-bias")


_ = torch, fold
