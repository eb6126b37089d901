"""Multiply the matrices of dense layers, by torch's own product or that of oneDNN.

In:  two matrices of rows, and a bias.
Out: the rows of one times the rows of the other.

torch multiplies float32 matrices on CPUs by the BLAS it was built with, on x86 MKL, and carries
oneDNN too. Which of them is faster is a matter of the processor: fedpet/pet/kernels/
matmul_timing.py measures it. The same products, summed in another order: results differ in the last
bits.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedpet.pet.kernels.input_recompute import to_columns

__all__ = [
    "PRODUCTS",
    "Product",
    "bound_onednn_cache",
    "linear_by",
    "onednn_matmul",
    "torch_matmul",
]

ROWS = 16
CACHE_VARIABLE, CACHED_SHAPES = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", 32
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

    For every shape oneDNN compiles code in milliseconds, a megabyte that it keeps as long as the
    process lives. Batches without padding have any number of tokens, so `left` is given rows of
    zeros up to a multiple of `ROWS`, which the others' products do not depend on.
    """
    if not _can(left, right):
        return torch_matmul(left, right, bias)
    multiply, rows = torch.ops.mkldnn._linear_pointwise, len(left)
    if _is_transposed(left) and left.shape[1] > right.shape[0]:
        y = to_columns(multiply(_by_rows(right), _rounded_up(left), None, "none", [], ""))[:rows]
        return y if bias is None else y.add_(bias)
    left = _rounded_up(_by_rows(left))
    if bias is None or bias.dim() == 1:
        return multiply(left, right, bias, "none", [], "")[:rows]  # type: ignore[no-any-return]
    return multiply(left, right, None, "none", [], "")[:rows].add_(bias)  # type: ignore[no-any-return]


def bound_onednn_cache() -> None:
    """Let oneDNN keep what it has made ready for `CACHED_SHAPES` shapes: a few steps' worth.

    By itself it keeps 1024, with their workspaces. It reads the variable at its first product in a
    process; one that is set stays.
    """
    os.environ.setdefault(CACHE_VARIABLE, str(CACHED_SHAPES))


def _rounded_up(x: Tensor) -> Tensor:
    """Add rows of zeros up to a multiple of `ROWS`; fewer rows than that stay as they are."""
    missing = -len(x) % ROWS if len(x) > ROWS else 0
    return nn.functional.pad(x, (0, 0, 0, missing)) if missing else x


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
