"""Adapt hidden states by S3PET's low-rank adapter: the one module that stays and costs latency.

In:  a block whose output, or its element 0, is that of a whole sub-layer, width d.
Out: h + scale * up(gelu(down(h))); down d -> m, up m -> d, m = d // 32, each weight a product of
     two factors of rank r, with a full bias.

It cannot be folded into the backbone: merging leaves it in the model as a sub-module, which
`added_parameters` declares. It is not linear in its values, so averaging them is not averaging
models; and it starts, as in the paper, from seeded factors that are not zero: zero values are
that start and not quite the checkpoint.

Source: S3PET (Hu et al., NeurIPS 2022, arXiv:2206.07382) and its released code: GELU in its tanh
form, Glorot-uniform factors, zero biases, no inner residual.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedpet.pet.modules.base import GatedModule, extend, output_width, seeded, value_dtype
from fedpet.pet.modules.module_config import ModuleConfig, check_rank
from fedpet.pet.modules.registry import ModuleSpec, register_module

__all__ = ["AdapterConfig", "LowRankAdapter"]


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(ModuleConfig):
    """S3PET's low-rank adapter after attention and feed-forward parts.

    It stays in the merged model and adds latency, and averaging its values is not averaging models.

    Attributes:
        r: Rank of its factors.
    """

    r: int = 8

    def __post_init__(self) -> None:
        check_rank(self, self.r)


_NAMES = ("down_in", "down_out", "down_bias", "up_in", "up_out", "up_bias")


def _size(d_in: int, d_out: int, rank: int) -> int:
    return (2 * rank + 1) * (d_out + _inner_width(d_out))


def _inner_width(d: int) -> int:
    return max(1, d // 32)


@register_module(
    "lowrank-adapter",
    targets={"block"},
    usual=lambda p: p.kind == "block",
    size=_size,
    config=AdapterConfig,
    ranked=True,
    spaces={"s3pet-mix": lambda p: p.kind == "block"},
    order=7,
)
class LowRankAdapter(GatedModule):
    """scale * up(gelu(down(h))) added to a block's output. NOT exact, and adds latency."""

    place = "sequential"
    exact = False

    def __init__(
        self, target: str, like: Tensor, width: int, rank: int, scale: float, seed: int
    ) -> None:
        super().__init__("lowrank-adapter", target)
        self._scale = scale
        d, m, r = width, _inner_width(width), rank
        self._shapes = ((r, d), (m, r), (m,), (r, m), (d, r), (d,))
        generator = seeded(seed, target, "lowrank-adapter")
        wide = value_dtype(like.dtype)
        self._start = [_glorot(s, generator).to(like.device, wide) for s in self._shapes]

    @classmethod
    def build(cls, spec: ModuleSpec, module: nn.Module, seed: int) -> LowRankAdapter:
        like = next(module.parameters())
        return cls(spec.target, like, output_width(module), spec.rank, spec.scale, seed)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return self._shapes

    @property
    def added_parameters(self) -> tuple[str, ...]:
        return tuple(f"{self.target}.lowrank_adapter.{name}" for name in _NAMES)

    def effect(self, x: Tensor | None) -> Tensor:
        assert x is not None
        return _apply(x, self._tensors(), self._scale)

    def gated(self, x: Tensor | None) -> Tensor:
        """Multiply the gate into r numbers a token: no output of all tokens is stored for it."""
        assert x is not None
        return _apply(x, self._tensors(), self._scale, self.gate)

    def merge(self, module: nn.Module) -> None:
        dtype = next(module.parameters()).dtype
        tensors = [tensor.to(dtype) for tensor in self._tensors()]
        module.add_module("lowrank_adapter", _MergedAdapter(tensors, self._scale))
        extend(module, "WithAdapter", _add_adapter)

    def _tensors(self) -> list[Tensor]:
        return [start + change for start, change in zip(self._start, self.trainables, strict=True)]


class _MergedAdapter(nn.Module):
    def __init__(self, tensors: Iterable[Tensor], scale: float) -> None:
        super().__init__()
        self.scale = scale
        for name, tensor in zip(_NAMES, tensors, strict=True):
            parameter = nn.Parameter(tensor.detach().clone(), requires_grad=False)
            self.register_parameter(name, parameter)

    def forward(self, h: Tensor) -> Tensor:
        return _apply(h, list(self.parameters()), self.scale)


def _apply(
    h: Tensor, tensors: Sequence[Tensor], scale: float, gate: Tensor | None = None
) -> Tensor:
    down_in, down_out, down_bias, up_in, up_out, up_bias = tensors
    linear = nn.functional.linear
    inner = linear(linear(h.to(down_in.dtype), down_in), down_out, down_bias)  # (..., m)
    inner = nn.functional.gelu(inner, approximate="tanh")
    inner = linear(inner, up_in)  # (..., r)
    if gate is not None:
        inner, up_bias = gate * inner, gate * up_bias
    return (linear(inner, up_out, up_bias) * scale).to(h.dtype)


def _add_adapter(block: nn.Module, output: Any) -> Any:
    adapter = block.lowrank_adapter
    assert isinstance(adapter, nn.Module)
    if isinstance(output, tuple):
        return (output[0] + adapter(output[0]), *output[1:])
    return output + adapter(output)


def _glorot(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.zeros(shape)
    bound = math.sqrt(6.0 / sum(shape))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
