"""Change the gain of a LayerNorm or an RMS norm: LNFit.

In:  a norm.
Out: a change of its weight, values (d,).

Source: S3PET (Hu et al., NeurIPS 2022, arXiv:2206.07382), there for T5's RMS norm: dw * x / rms(x)
added to the output, which is a change of the gain. The same holds of LayerNorm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fedpet.backbone.module_roles import Position
from fedpet.errors import ConfigError, StructureError
from fedpet.pet.modules.base import GatedModule
from fedpet.pet.modules.module_config import ModuleConfig
from fedpet.pet.modules.registry import ModuleSpec, register_module

__all__ = ["LNFit", "LayerNormConfig"]


@dataclass(frozen=True, kw_only=True)
class LayerNormConfig(ModuleConfig):
    """Gains and biases of norms; an RMS norm has a gain alone.

    Attributes:
        weight: Train the gains.
        bias: Train the biases, where there are some.
    """

    weight: bool = True
    bias: bool = True

    def __post_init__(self) -> None:
        if not (self.weight or self.bias):
            raise ConfigError("LayerNormConfig must train weight, bias or both, got neither.")

    def specs(self, positions: Sequence[Position]) -> list[ModuleSpec]:
        biased = {position.name for position in positions if position.has_bias}
        gains = self.specs_of("lnfit", positions)
        biases = [ModuleSpec("ln-bias", gain.target) for gain in gains if gain.target in biased]
        if not self.weight and not biases:
            raise StructureError(
                "LayerNormConfig(weight=False) trains biases of norms, and those that it names "
                "have none in this model: train their gains with weight=True."
            )
        return [*(gains if self.weight else ()), *(biases if self.bias else ())]


def _is_norm(p: Position) -> bool:
    return p.kind == "norm"


@register_module(
    "lnfit",
    targets={"norm"},
    usual=_is_norm,
    size=lambda d_in, d_out, rank: d_out,
    config=LayerNormConfig,
    spaces={"mergeable": _is_norm, "s3pet-mix": _is_norm},
    order=5,
)
class LNFit(GatedModule):
    """A change of a norm's gain. Exact."""

    place = "weight"
    as_leaf = True

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
        """Do nothing: the model's gain has the change already."""
