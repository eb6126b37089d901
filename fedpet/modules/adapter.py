"""S3PET's low-rank adapter on hidden states: the one module that stays and costs latency.

In:  a block whose output, or its element 0, is that of a whole sub-layer, width d.
Out: h + up(gelu(down(h))); down d -> m, up m -> d, m = d // 32, each weight a product of two
     factors of rank r, with a full bias.

It cannot be folded into the backbone: merging leaves it in the model as a sub-module, which
`added_parameters` declares. It is not linear in its values, so averaging them is not averaging
models; and it starts, as in the paper, from seeded factors that are not zero: zero values are
that start and not quite the checkpoint.

Source: S3PET (arXiv:2206.07382) and its released code: tanh-form GELU, Glorot-uniform factors,
zero biases, no inner residual.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fedpet.modules.base import PetModule, extend, seeded

__all__ = ["LowRankAdapter"]


class LowRankAdapter(PetModule):
    """up(gelu(down(h))) added to a block's output. NOT exact, and adds latency."""

    place = "sequential"
    exact = False

    def __init__(
        self, target: str, like: Tensor, d: int, rank: int, scale: float, seed: int
    ) -> None:
        super().__init__("lowrank-adapter", target)
        self.scale = scale
        m = max(1, d // 32)
        self._shapes = ((rank, d), (m, rank), (m,), (rank, m), (d, rank), (d,))
        generator = seeded(seed, target, "lowrank-adapter")
        self._start = [_glorot(shape, generator).to(like) for shape in self._shapes]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return self._shapes

    @property
    def added_parameters(self) -> tuple[str, ...]:
        return tuple(f"{self.target}.lowrank_adapter.{name}" for name in _NAMES)

    def effect(self, x: Tensor) -> Tensor:
        tensors = [start + v for start, v in zip(self._start, self.trainables, strict=True)]
        return _apply(x, tensors, self.scale)

    def merge(self, module: nn.Module) -> None:
        tensors = [
            (start + v).detach() for start, v in zip(self._start, self.trainables, strict=True)
        ]
        module.add_module("lowrank_adapter", _MergedAdapter(tensors, self.scale))
        cls = extend(module, "WithAdapter")
        plain = cls.__mro__[1].forward

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            output = plain(self, *args, **kwargs)
            if isinstance(output, tuple):
                return (output[0] + self.lowrank_adapter(output[0]), *output[1:])
            return output + self.lowrank_adapter(output)

        cls.forward = forward


_NAMES = ("down_in", "down_out", "down_bias", "up_in", "up_out", "up_bias")


def _apply(h: Tensor, tensors: list[Tensor], scale: float) -> Tensor:
    down_in, down_out, down_bias, up_in, up_out, up_bias = tensors
    linear = nn.functional.linear
    inner = linear(linear(h, down_in), down_out, down_bias)  # (..., m)
    inner = nn.functional.gelu(inner, approximate="tanh")
    return linear(linear(inner, up_in), up_out, up_bias) * scale


class _MergedAdapter(nn.Module):
    def __init__(self, tensors: list[Tensor], scale: float) -> None:
        super().__init__()
        self.scale = scale
        for name, tensor in zip(_NAMES, tensors, strict=True):
            self.register_parameter(name, nn.Parameter(tensor.clone(), requires_grad=False))

    def forward(self, h: Tensor) -> Tensor:
        return _apply(h, [getattr(self, name) for name in _NAMES], self.scale)


def _glorot(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.zeros(shape)
    bound = math.sqrt(6.0 / sum(shape))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
