"""A matrix in columns is the same matrix: what the sampled product reads is never rounded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpet.pet.kernels.input_recompute import COLLIDING, to_columns


@given(
    tokens=st.integers(0, 130),
    features=st.integers(1, 70),
    skipped=st.integers(0, 3),
    data=st.data(),
)
def test_columns_hold_the_numbers_of_the_rows(
    tokens: int, features: int, skipped: int, data: st.DataObject
) -> None:
    width = features + data.draw(st.integers(0, 2))  # wider rows are cut: not contiguous
    whole = torch.randn(skipped + tokens, width)
    rows = whole[skipped:, :features]
    columns = to_columns(rows)
    assert columns.shape == (features, tokens)
    assert columns.is_contiguous()
    assert torch.equal(columns, rows.t())


@pytest.mark.parametrize("tokens", [COLLIDING, 2 * COLLIDING, 3 * COLLIDING])
@pytest.mark.parametrize("features", [1, 5, 384])
def test_columns_that_would_fall_into_the_same_lines_of_the_cache(
    tokens: int, features: int
) -> None:
    rows = torch.randn(tokens, features)
    columns = to_columns(rows)
    assert columns.is_contiguous()
    assert torch.equal(columns, rows.t())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_columns_of_any_type(dtype: torch.dtype) -> None:
    rows = torch.randn(67, 48).to(dtype)
    assert torch.equal(to_columns(rows), rows.t())


def test_what_lies_in_columns_already_is_not_copied() -> None:
    rows = torch.randn(48, 67).t()
    assert to_columns(rows).data_ptr() == rows.data_ptr()
