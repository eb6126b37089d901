"""Compute a norm of a bfloat16 model in float32, where some of its tensors are trained in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fedpet.pet.modules.base import value_dtype

__all__ = ["widened"]


def widened(plain: Callable[..., Any], module: nn.Module) -> Callable[..., Any]:
    """Return `plain`, the forward of a module, in the type of its widest tensor.

    Its input and its own tensors are widened, and its output is rounded to the input's type.
    """
    own: dict[str, Any] = module._parameters

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        wide = value_dtype(x.dtype)
        before = {name: tensor for name, tensor in own.items() if tensor is not None}
        try:
            own.update({name: tensor.to(wide) for name, tensor in before.items()})
            return plain(x.to(wide), *args, **kwargs).to(x.dtype)
        finally:
            own.update(before)

    return forward
