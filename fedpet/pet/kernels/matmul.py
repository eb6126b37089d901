"""Multiply the matrices of dense layers, by torch's own product or that of oneDNN.

In:  two matrices of rows, and a bias.
Out: the rows of one times the rows of the other.

torch multiplies float32 matrices on CPUs by the BLAS it was built with. On x86 that is MKL, which
leaves the AVX-512 units of processors that are not Intel's idle. torch carries oneDNN too, which
asks a processor what it can do and not who made it: half the time on an AMD EPYC (`simulations/
benchmarks/results/training_step.json`). The same products, summed in another order: results differ
in the last bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedpet.pet.kernels.input_recompute import to_columns

__all__ = ["PRODUCTS", "Product", "onednn_matmul", "torch_matmul"]

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
