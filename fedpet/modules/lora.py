"""LoRA: a low-rank change of a dense weight.

In:  a Linear or Conv1D with input d_in and output d_out.
Out: scale * (x A^T) B^T beside it. A (r, d_in) is Kaiming-uniform, B (d_out, r) starts at zero.

`LoRA`, the exact form, freezes A, which every device draws from the same seed, and sends B: the
change of the weight is linear in B, so averaging values is averaging models (law 3). Averaging
both factors is not, since mean(B) mean(A) is not mean(B A): that is `LoRAFactors`, kept because
it is what the papers train.

Source: Hu et al., ICLR 2022, arXiv:2106.09685; the frozen A as in FFA-LoRA (Sun et al., ICLR
2024, arXiv:2403.12313).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedpet.modules.base import PetModule, fold, is_transposed, kaiming_uniform, seeded

__all__ = ["LoRA", "LoRAFactors", "LowRankBranch", "dense_sizes"]


def dense_sizes(module: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a Linear or Conv1D."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    d_out, d_in = weight.shape
    return (d_out, d_in) if is_transposed(module) else (d_in, d_out)


class LowRankBranch(PetModule):
    """scale * (x A^T) B^T with a frozen A (r, d_in); the trainable is B (d_out, r). Exact."""

    place = "parallel"

    def __init__(self, kind: str, target: str, down: Tensor, d_out: int, scale: float) -> None:
        super().__init__(kind, target)
        self.down = down  # (r, d_in)
        self.scale = scale
        self._shape = (d_out, down.shape[0])

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return (self._shape,)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, d_in) and B (d_out, r)."""
        return self.down, self.trainables[0]

    def effect(self, x: Tensor) -> Tensor:
        down, up = self.factors
        return nn.functional.linear(nn.functional.linear(x, down), up) * self.scale

    def merge(self, module: nn.Module) -> None:
        down, up = self.factors
        change = self.scale * (up @ down)  # (d_out, d_in)
        fold(module, "weight", change.T.contiguous() if is_transposed(module) else change)


class LoRA(LowRankBranch):
    """LoRA with a frozen, seeded down-projection. Exact."""

    def __init__(self, target: str, module: nn.Module, rank: int, scale: float, seed: int) -> None:
        d_in, d_out = dense_sizes(module)
        super().__init__("lora", target, _seeded_down(target, module, rank, seed), d_out, scale)


class LoRAFactors(LowRankBranch):
    """LoRA with both factors trained and sent. NOT exact: the change is bilinear in its values.

    The values of A are its change since its seeded start, so that zero values are the checkpoint.
    """

    exact = False

    def __init__(self, target: str, module: nn.Module, rank: int, scale: float, seed: int) -> None:
        d_in, d_out = dense_sizes(module)
        down = _seeded_down(target, module, rank, seed)
        super().__init__("lora-factors", target, down, d_out, scale)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return (tuple(self.down.shape), self._shape)

    def bind(self, trainables: Sequence[Tensor]) -> None:
        super().bind(trainables)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        return self.down + self.trainables[0], self.trainables[1]


def _seeded_down(target: str, module: nn.Module, rank: int, seed: int) -> Tensor:
    d_in, _ = dense_sizes(module)
    generator = seeded(seed, target, "lora-down")
    weight = module.weight
    assert isinstance(weight, Tensor)
    return kaiming_uniform((rank, d_in), d_in, generator, a=math.sqrt(5)).to(weight)


_ = torch
