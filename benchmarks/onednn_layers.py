"""Dense layers of a plain model, multiplied by oneDNN: what an opponent can be given too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedpet.pet.kernels.matmul import onednn_matmul


def multiply_by_onednn(model: nn.Module) -> None:
    """Give every Linear of `model`, and every one of peft's SHiRA, all its products by oneDNN."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = _forward_of(module)  # type: ignore[method-assign]
        elif hasattr(module, "shira_weight"):
            module.forward = _shira_forward_of(module)


def _forward_of(module: nn.Linear) -> Any:
    def forward(x: Tensor) -> Tensor:
        return _Linear.apply(x, module.weight, module.bias)  # type: ignore[no-any-return, no-untyped-call]

    return forward


def _shira_forward_of(layer: Any) -> Any:
    """Compute one adapter as peft does: a weight with its change, and one product."""

    def forward(x: Tensor) -> Tensor:
        weight = layer.get_base_weight().clone()
        for name in layer.active_adapters:
            weight += layer.get_delta_weight(name)
        return _Linear.apply(x, weight, layer.base_layer.bias)  # type: ignore[no-any-return, no-untyped-call]

    return forward


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weight)
        ctx.shape = x.shape
        return onednn_matmul(rows, weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        g = g.reshape(-1, g.shape[-1])
        return (
            onednn_matmul(g, weight.t(), None).view(ctx.shape) if needs_x else None,
            onednn_matmul(g.t(), rows.t(), None) if needs_weight else None,
            g.sum(0) if needs_bias else None,
        )
