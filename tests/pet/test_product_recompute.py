"""A masked layer behind a product of two tensors stores neither it nor a tensor of its size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fedpet.pet.kernels import input_recompute
from fedpet.pet.kernels.input_recompute import save_input

LIVE = torch.tensor([0, 3])


def factors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    one, other = (torch.randn(2, 3, 5, generator=generator).to(dtype) for _ in range(2))
    return one.requires_grad_(), other.requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_stored_as_its_factors_and_made_again_to_the_bit(dtype: torch.dtype) -> None:
    one, other = factors(dtype)
    product = one.exp() * other
    saved, source = save_input(product)
    assert source.untyped_storage().nbytes() == 0
    whole = product.detach().reshape(-1, 5)
    assert torch.equal(saved.rows(source, torch.float32), whole.float())
    assert torch.equal(saved.rows(source, dtype, LIVE), whole[LIVE])


@pytest.mark.parametrize(
    "make",
    [
        lambda one, other: one + other,
        lambda one, other: one * 2.0,
        lambda one, other: one * other[:, :1],
        lambda one, other: one * other.detach(),
        lambda one, other: one.float() * other.double(),
    ],
    ids=["a sum", "a number", "broadcast", "one factor unstored", "two types"],
)
def test_anything_else_is_stored_itself(make: Callable[[Tensor, Tensor], Tensor]) -> None:
    made = make(*factors())
    saved, source = save_input(made)
    assert torch.equal(source, made)
    assert torch.equal(saved.rows(source, made.dtype), made.detach().reshape(-1, 5))


def test_where_checkpointing_stores_tensors_a_product_is_stored_itself() -> None:
    one, other = factors()
    sizes: list[int] = []

    def block(x: Tensor, y: Tensor) -> Tensor:
        product = x.exp() * y
        sizes.append(save_input(product)[1].numel())
        return product

    checkpoint(block, one, other, use_reentrant=False).sum().backward()
    assert set(sizes) == {one.numel()}


def test_a_torch_that_does_not_tell_who_stores_tensors_has_products_stored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(input_recompute.torch._C._autograd, "_top_saved_tensors_default_hooks")
    one, other = factors()
    assert save_input(one.exp() * other)[1].numel() == one.numel()
