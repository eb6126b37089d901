"""Change a bias: BitFit.

In:  a dense module or a norm.
Out: a vector added to its output, values (d_out,).

Where the layer has no bias (T5, Llama) the vector is one: merging then leaves a parameter named
"bias" in the model, which `added_parameters` declares (law 1's exception).

Source: Ben Zaken et al., ACL 2022, arXiv:2106.10199 (BitFit), in the form of S3PET (Hu et al.,
NeurIPS 2022, arXiv:2206.07382): a constant vector, zero at the start, added to the output of
Linear or LayerNorm. Ours: key biases and the pooler's are no usual targets, and HiWi on the same
bias shares its values.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fedpet.backbone.module_roles import Position
from fedpet.pet.modules.base import GatedModule, dense_sizes, extend, is_dense
from fedpet.pet.modules.hiwi import HiwiBias
from fedpet.pet.modules.module_config import ModuleConfig
from fedpet.pet.modules.registry import (
    ALL_LINEAR,
    DENSE,
    ModuleSpec,
    linears,
    register_module,
    register_preset,
)

__all__ = ["BitFit", "BitFitConfig", "NormBias"]


@dataclass(frozen=True, kw_only=True)
class BitFitConfig(ModuleConfig):
    """Biases of dense layers; a named layer that has none gets one.

    The usual modules are the dense layers with a bias, but for keys (softmax cancels theirs) and
    the pooler.
    """


def _is_live(p: Position) -> bool:
    """Tell whether a bias has an effect: softmax cancels a constant added to every key."""
    return p.has_bias and linears()(p) and p.role not in ("key", "cross-key", "pooler")


@register_module(
    "bitfit",
    targets=DENSE | {"norm"},
    usual=_is_live,
    size=lambda d_in, d_out, rank: d_out,
    config=BitFitConfig,
    tensor="bias",
    spaces={
        "mergeable": lambda p: p.has_bias and linears(*ALL_LINEAR, "pooler")(p) and p.role != "key",
        "s3pet-mix": lambda p: linears(*ALL_LINEAR)(p) or p.kind == "norm",
    },
    order=3,
)
class BitFit(GatedModule):
    """A change of a bias, or a bias where there is none. Exact."""

    place = "bias"
    as_leaf = True

    def __init__(self, target: str, module: nn.Module, kind: str = "bitfit") -> None:
        super().__init__(kind, target)
        weight = module.weight
        assert isinstance(weight, Tensor)
        self._width = dense_sizes(module)[1] if is_dense(module) else len(weight)
        self._adds = getattr(module, "bias", None) is None
        self.adapter: HiwiBias | None = None  # on the same bias; its change is sent with this one

    @classmethod
    def build(cls, spec: ModuleSpec, module: nn.Module, seed: int) -> BitFit:
        return cls(spec.target, module)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return ((self._width,),)

    @property
    def added_parameters(self) -> tuple[str, ...]:
        return (f"{self.target}.bias",) if self._adds else ()

    def effect(self, x: Tensor | None) -> Tensor:
        return self.trainables[0]

    def write(self, values: Tensor, seed: int) -> None:
        super().write(values, seed)
        if self.adapter is not None:
            self.adapter.write(values, seed)

    @property
    def sends_trainables(self) -> bool:
        return self.adapter is None

    def sent(self) -> Tensor:
        values = super().sent()
        return values if self.adapter is None else values + self.adapter.effect(None)

    def merge(self, module: nn.Module) -> None:
        if not self._adds:
            return  # the model's bias holds it
        assert isinstance(module.weight, Tensor)
        change = self.trainables[0].detach().to(module.weight.dtype, copy=True)
        bias = nn.Parameter(change, requires_grad=False)
        module.register_parameter("bias", bias)
        if not isinstance(module, nn.Linear):
            extend(module, "WithBias", lambda norm, output: output + norm.bias)


def _is_biased_norm(p: Position) -> bool:
    return p.kind == "norm" and p.has_bias


@register_module(
    "ln-bias",
    targets={"norm"},
    usual=_is_biased_norm,
    size=lambda d_in, d_out, rank: d_out,
    tensor="bias",
    spaces={"mergeable": _is_biased_norm},
    order=6,
)
class NormBias(BitFit):
    """A change of a norm's bias. Exact."""

    def __init__(self, target: str, module: nn.Module) -> None:
        super().__init__(target, module, "ln-bias")


register_preset("pooler-bias", "bitfit", lambda p: linears("pooler")(p) and p.has_bias)
# A bias where the layer has none: merging leaves it there (T5, Llama). Not in a default.
register_preset(
    "added-bias", "bitfit", lambda p: linears()(p) and not p.has_bias and p.role != "key"
)
