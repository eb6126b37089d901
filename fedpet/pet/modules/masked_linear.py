"""Train a few entries of a dense layer, written as the mathematics says it: W = W0 + M * V.

In:  a Linear, and the flat positions of its trainable entries.
Out: the same layer, whose gradient is that of V where the mask M is 1.

The tests compare the kernel with this: `dense` and `masked` compute the same outputs and the same
gradient, without a dense V, M or gradient ever being formed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["MaskedLinear"]


class MaskedLinear(nn.Module):
    """y = x (W0 + M * V)^T + b, with W0, M and b fixed and V trained by plain autograd."""

    def __init__(self, layer: nn.Linear, positions: Tensor) -> None:
        super().__init__()
        mask = torch.zeros(layer.weight.numel(), dtype=layer.weight.dtype)
        mask[positions] = 1.0
        self.mask = mask.view_as(layer.weight)  # M, (out, in)
        self.start = layer.weight.detach().clone()  # W0, (out, in)
        self.bias = layer.bias  # (out,) or None
        self.change = nn.Parameter(torch.zeros_like(self.start))  # V, (out, in)
        self.positions = positions

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.start + self.mask * self.change, self.bias)

    def values(self) -> Tensor:
        """Return the communicated change at the positions, (k,), in their order."""
        return self.change.detach().flatten()[self.positions]
