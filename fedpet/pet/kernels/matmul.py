"""Multiply the matrices of dense layers, by torch's own product or that of oneDNN.

In:  two matrices of rows, and a bias.
Out: the rows of one times the rows of the other.

torch multiplies float32 matrices on CPUs by the BLAS it was built with, on x86 MKL, and carries
oneDNN too. Which of them is faster is a matter of the processor: fedpet/pet/kernels/
matmul_timing.py measures it. The same products, summed in another order: results differ in the last
bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedpet.pet.kernels.input_recompute import to_columns

__all__ = ["PRODUCTS", "Product", "linear_by", "onednn_matmul", "torch_matmul"]

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def torch_matmul(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """Compute left right^T + bias.

    Args:
        left: (m, k), of any strides, as `right`.
        right: (n, k).
        bias: (n,) or (m, 1), or None.
    """
    if bias is None:
        return left @ right.t()
    return torch.addmm(bias, left, right.t())


def onednn_matmul(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the same by oneDNN, where it can: float32 on a CPU, in a torch that carries it.

    torch hands `right` to it as it lies, and copies a transposed `left` number by number first. We
    transpose whichever is smaller: `left`, or (computing right left^T) the result.
    """
    if not _can(left, right):
        return torch_matmul(left, right, bias)
    multiply = torch.ops.mkldnn._linear_pointwise
    if _is_transposed(left) and left.shape[1] > right.shape[0]:
        y = to_columns(multiply(_by_rows(right), left, None, "none", [], ""))
        return y if bias is None else y.add_(bias)
    left = _by_rows(left)
    if bias is None or bias.dim() == 1:
        return multiply(left, right, bias, "none", [], "")  # type: ignore[no-any-return]
    return multiply(left, right, None, "none", [], "").add_(bias)  # type: ignore[no-any-return]


PRODUCTS: dict[str, Product] = {
    "torch": torch_matmul,
    "onednn": onednn_matmul,
}  # `training.matmul-backend`


class linear_by(TorchFunctionMode):
    """Compute `torch.nn.functional.linear` within the context by a product; gives no gradients."""

    def __init__(self, name: str) -> None:
        """Take a name of `PRODUCTS`."""
        super().__init__()
        self._product = PRODUCTS[name]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Replace the one function, and call every other."""
        if func is nn.functional.linear and not kwargs and self._product is not torch_matmul:
            x, weight, bias = (*args, None)[:3]
            return self._product(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)
        return func(*args, **(kwargs or {}))


def _is_transposed(x: Tensor) -> bool:
    return x.t().is_contiguous() and not x.is_contiguous()


def _by_rows(x: Tensor) -> Tensor:
    return to_columns(x.t()) if _is_transposed(x) else x


def _can(left: Tensor, right: Tensor) -> bool:
    return (
        left.dtype == right.dtype == torch.float32
        and left.device.type == "cpu"
        and left.numel() > 0
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
    )
