"""LNFit: a change of the gain of a LayerNorm or an RMS norm.

In:  a norm.
Out: a change of its weight, values (d,).

Source: S3PET (Hu et al., NeurIPS 2022, arXiv:2206.07382), there for T5's RMS norm: dw * x / rms(x)
added to the output, which is a change of the gain. The same holds of LayerNorm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from fedpet.pet.modules.base import GatedModule
from fedpet.pet.modules.registry import register_module

if TYPE_CHECKING:
    from fedpet.pet.structure import ModuleSpec

__all__ = ["LNFit"]


@register_module(
    "lnfit",
    targets={"norm"},
    usual=lambda p: p.kind == "norm",
    size=lambda d_in, d_out, rank: d_out,
    gradient=1e-3,
    spread=0.35,
)
class LNFit(GatedModule):
    """A change of a norm's gain. Exact."""

    place = "weight"
    held = True

    def __init__(self, target: str, module: nn.Module) -> None:
        super().__init__("lnfit", target)
        assert isinstance(module.weight, Tensor)
        self._width = len(module.weight)

    @classmethod
    def build(cls, spec: ModuleSpec, module: nn.Module, seed: int) -> LNFit:
        return cls(spec.target, module)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return ((self._width,),)

    def effect(self, x: Tensor | None) -> Tensor:
        return self.trainables[0]

    def merge(self, module: nn.Module) -> None:
        """Nothing to do: the model's gain holds the change already."""
