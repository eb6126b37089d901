"""Change a dense weight by a matrix of low rank: LoRA.

In:  a dense module with input d_in and output d_out.
Out: scale * (x A^T) B^T beside it. A (r, d_in) is Kaiming-uniform, B (d_out, r) starts at zero.

`LoRA`, the exact form, freezes A, which every device draws from the same seed, and sends B: the
change of the weight is linear in B, so averaging values is averaging models (law 3). Averaging
both factors is not, since mean(B) mean(A) is not mean(B A): that is `LoRAFactors`, kept because
it is what the papers train.

Source: Hu et al., ICLR 2022, arXiv:2106.09685; the frozen A is that of FFA-LoRA (Sun et al., ICLR
2024, arXiv:2403.12313). Ours: each device draws A from one seed, and it is never sent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedpet.errors import ConfigError
from fedpet.pet.modules.base import (
    GatedModule,
    dense_sizes,
    is_transposed,
    kaiming_uniform,
    seeded,
    value_dtype,
)
from fedpet.pet.modules.module_config import ModuleConfig, check_rank
from fedpet.pet.modules.registry import ALL_LINEAR, DENSE, ModuleSpec, linears, register_module

__all__ = ["LoRA", "LoRAFactors", "LoraConfig", "LowRankBranch"]


class LowRankBranch(GatedModule):
    """scale * (x A^T) B^T with a frozen A (r, d_in); the trainable is B (d_out, r). Exact."""

    place = "parallel"
    fused: ClassVar[bool] = True  # with the layer's own product, see `dense`

    def __init__(self, kind: str, target: str, down: Tensor, d_out: int, scale: float) -> None:
        super().__init__(kind, target)
        self._down = down  # (r, d_in)
        self._up_shape = (d_out, len(down))
        self.in_place = False  # backward adds to B's gradient itself
        self.scale = scale

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return (self._up_shape,)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A (r, d_in) and B (d_out, r)."""
        return self._down, self.trainables[0]

    def factors_as(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return both, rounded to the type of the numbers that they meet."""
        down, up = self.factors()
        return (down, up) if up.dtype == dtype else (down.to(dtype), up.to(dtype))

    def effect(self, x: Tensor | None) -> Tensor:
        assert x is not None
        down, up = self.factors_as(x.dtype)
        linear = nn.functional.linear
        return linear(linear(x, down) * self.scale, up)

    def added(self, y: Tensor, x: Tensor) -> Tensor:
        """Compute y + gate * scale * (x A^T) B^T; the gate meets r numbers a token."""
        down, up = self.factors_as(x.dtype)
        inner = self.scaled(nn.functional.linear(x, down))
        rows = inner.reshape(-1, inner.shape[-1])
        return torch.addmm(y.reshape(-1, y.shape[-1]), rows, up.t()).view(y.shape)

    def scaled(self, inner: Tensor) -> Tensor:
        """Multiply the inner numbers, between the factors, by the scale and the gate."""
        inner = inner * self.scale
        return inner if self.gate is None else inner * self.gate

    def gradient(
        self, inner: Tensor, g: Tensor, grad_x: Tensor | None, gate: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Compute the gradients of B, (d_out, r), and of the gate; None of B if added in place.

        Args:
            inner: x A^T, (tokens, r).
            g: Gradient of the output, (tokens, d_out).
            grad_x: Of the input, (tokens, d_in); this branch's share is added to it.
            gate: Scalar, or None without one.
        """
        down, up = self.factors_as(g.dtype)
        of_inner = None if grad_x is None and gate is None else g @ up  # (tokens, r)
        of_gate = None
        if gate is not None:
            assert of_inner is not None
            of_gate = (self.scale * (inner * of_inner).sum()).to(gate.dtype).view_as(gate)
            of_inner, inner = of_inner * gate, inner * gate
        if grad_x is not None and of_inner is not None:
            grad_x.addmm_(of_inner, down, alpha=self.scale)
        into = self.trainables[0].grad
        if into is None or not self.in_place:
            return self.scale * (g.t() @ inner).to(self.trainables[0].dtype), of_gate
        if g.dtype != into.dtype:
            g, inner = g.to(into.dtype), inner.to(into.dtype)
        into.addmm_(g.t(), inner, alpha=self.scale)
        return None, of_gate

    def merge(self, module: nn.Module) -> None:
        down, up = self.factors()
        change = self.scale * (up @ down)  # (d_out, d_in)
        assert isinstance(module.weight, Tensor)
        module.weight.add_(change.T if is_transposed(module) else change)


@dataclass(frozen=True, kw_only=True)
class LoraConfig(ModuleConfig):
    """LoRA: a low-rank change of a dense weight.

    Attributes:
        r: Rank.
        lora_alpha: The change is multiplied by lora_alpha / r.
        freeze_a: A is drawn from the seed, and B alone is trained and sent: then the mean of the
            clients' values is the mean of their models. False trains both factors, as peft does.

    The usual modules are the projections to queries and values.

    Example:
        >>> LoraConfig(r=4, target_modules=["query", "ffn-up"]).scale
        4.0
    """

    r: int = 8
    lora_alpha: float = 16.0
    freeze_a: bool = True

    def __post_init__(self) -> None:
        check_rank(self, self.r)
        if not self.lora_alpha > 0 or self.lora_alpha == float("inf"):
            raise ConfigError(
                f"lora_alpha must be above 0 and finite, got {self.lora_alpha!r}. The change is "
                "multiplied by lora_alpha / r."
            )

    @property
    def scale(self) -> float:
        return self.lora_alpha / self.r

    def kind_of_module(self) -> str:
        return "lora" if self.freeze_a else "lora-factors"


_USUAL = linears("query", "value", "query-key-value")


@register_module(
    "lora",
    targets=DENSE,
    usual=_USUAL,
    size=lambda d_in, d_out, rank: rank * d_out,  # the down-projection is frozen
    config=LoraConfig,
    ranked=True,
    scaled=True,
    spaces={"mergeable": linears(*ALL_LINEAR, "pooler")},
    order=1,
)
class LoRA(LowRankBranch):
    """LoRA with a frozen, seeded down-projection. Exact."""

    def __init__(self, target: str, module: nn.Module, rank: int, scale: float, seed: int) -> None:
        down = _seeded_down(target, module, rank, seed)
        super().__init__("lora", target, down, dense_sizes(module)[1], scale)

    @classmethod
    def build(cls, spec: ModuleSpec, module: nn.Module, seed: int) -> LoRA:
        return cls(spec.target, module, spec.rank, spec.scale, seed)


@register_module(
    "lora-factors",
    targets=DENSE,
    usual=_USUAL,
    size=lambda d_in, d_out, rank: rank * (d_in + d_out),
    config=LoraConfig,
    ranked=True,
    scaled=True,
    spaces={"s3pet-mix": linears(*ALL_LINEAR), "s3pet-lora": linears(*ALL_LINEAR)},
    order=1,
)
class LoRAFactors(LowRankBranch):
    """LoRA with both factors trained and sent. NOT exact: the change is bilinear in its values.

    The values of A are its change since its seeded start, so that zero values are the checkpoint.
    """

    exact = False
    fused = False

    def __init__(self, target: str, module: nn.Module, rank: int, scale: float, seed: int) -> None:
        down = _seeded_down(target, module, rank, seed)
        super().__init__("lora-factors", target, down, dense_sizes(module)[1], scale)

    @classmethod
    def build(cls, spec: ModuleSpec, module: nn.Module, seed: int) -> LoRAFactors:
        return cls(spec.target, module, spec.rank, spec.scale, seed)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return (tuple(self._down.shape), self._up_shape)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self._down + self.trainables[0], self.trainables[1]


def _seeded_down(target: str, module: nn.Module, rank: int, seed: int) -> Tensor:
    d_in, _ = dense_sizes(module)
    weight = module.weight
    assert isinstance(weight, Tensor)
    generator = seeded(seed, target, "lora")
    down = kaiming_uniform((rank, d_in), d_in, generator, a=math.sqrt(5))
    return down.to(weight.device, value_dtype(weight.dtype))
