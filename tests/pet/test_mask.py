"""PaFi's mask: which entries, in which order, whatever the machine."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpet.config import MaskConfig
from fedpet.errors import ConfigError
from fedpet.pet.mask import build_mask, mask_size, rank_positions

# Computed with numpy in float64 from the rule; ties by position, k rounded down.
TENSORS = {
    "A": torch.tensor([[0.5, -0.03, 0.2], [-0.7, 0.01, 0.9]]),
    "B": torch.tensor([0.04, -0.06, 0.002, -0.3]),
}
HEAD = {"C_head": torch.tensor([[0.001, -0.0025], [0.003, 0.0035]])}


def flat(params: dict[str, torch.Tensor], positions: dict[str, torch.Tensor]) -> list[int]:
    """Positions over all tensors in the order of the names."""
    offset, chosen = 0, []
    for name, tensor in sorted(params.items()):
        chosen += sorted(int(p) + offset for p in positions.get(name, []))
        offset += tensor.numel()
    return chosen


def test_the_smallest_entries_over_all_tensors_are_chosen() -> None:
    mask = build_mask(TENSORS, MaskConfig(density=0.4))
    assert flat(TENSORS, mask.positions) == [1, 4, 6, 8]
    assert mask.num_values == 4


def test_per_tensor_granularity_rounds_down_in_each_tensor() -> None:
    mask = build_mask(TENSORS, MaskConfig(density=0.4, granularity="per-tensor"))
    assert {name: sorted(p.tolist()) for name, p in mask.positions.items()} == {
        "A": [1, 4],
        "B": [2],
    }


def test_a_small_valued_head_would_eat_the_budget_if_it_were_in_scope() -> None:
    mask = build_mask(TENSORS | HEAD, MaskConfig(density=0.4))
    assert {name: len(p) for name, p in mask.positions.items()} == {"B": 1, "C_head": 4}


def test_the_largest_are_the_control_and_not_pafi() -> None:
    mask = build_mask(TENSORS, MaskConfig(density=0.4, rule="largest"))
    assert flat(TENSORS, mask.positions) == [0, 3, 5, 9]


def test_positions_come_in_the_order_of_rank() -> None:
    positions = build_mask(TENSORS, MaskConfig(density=0.5)).positions
    for name, chosen in positions.items():
        magnitude = TENSORS[name].abs().flatten()[chosen]
        assert torch.equal(magnitude, magnitude.sort().values)


def test_equal_magnitudes_go_to_the_earlier_entry_and_the_earlier_name() -> None:
    tied = {"b": torch.full((3,), 0.1), "a": torch.tensor([-0.1, 0.1])}
    mask = build_mask(tied, MaskConfig(density=0.6))
    assert {name: p.tolist() for name, p in mask.positions.items()} == {"a": [0, 1], "b": [0]}


@given(
    st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=60),
    st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=60),
    st.sampled_from(["smallest", "largest", "random"]),
    st.sampled_from([0.02, 0.1, 0.3, 0.5]),
    st.sampled_from([1.0, 1.7, 2.0]),
)
def test_a_lower_density_is_a_prefix_in_every_tensor(
    first: list[float], second: list[float], rule: str, low: float, factor: float
) -> None:
    params = {"x": torch.tensor(first), "y": torch.tensor(second)}
    try:
        small = build_mask(params, MaskConfig(density=low, rule=rule)).positions
    except ConfigError:
        assert mask_size(low, len(first) + len(second)) == 0
        return
    large = build_mask(params, MaskConfig(density=low * factor, rule=rule)).positions
    for name, chosen in small.items():
        assert torch.equal(large[name][: len(chosen)], chosen)


@given(st.lists(st.floats(-1, 1, width=32), min_size=4, max_size=80), st.integers(1, 100))
def test_the_number_of_entries_is_the_density_times_the_size_rounded_down(
    entries: list[float], percent: int
) -> None:
    expected = percent * len(entries) // 100
    if expected:
        mask = build_mask({"w": torch.tensor(entries)}, MaskConfig(density=percent / 100))
        assert mask.num_values == expected


@given(st.lists(st.floats(-1, 1, width=32), min_size=4, max_size=80))
def test_the_rank_is_recomputed_from_a_received_set(entries: list[float]) -> None:
    params, config = {"w": torch.tensor(entries)}, MaskConfig(density=0.5)
    mask = build_mask(params, config)
    received = {name: chosen.flip(0) for name, chosen in mask.positions.items()}
    again = rank_positions(params, received, config)
    assert all(torch.equal(again[name], chosen) for name, chosen in mask.positions.items())


def test_ten_thousand_entries_at_a_hundredth_of_a_percent_keep_one() -> None:
    assert mask_size(0.0001, 10_000) == 1  # 10000 * (1 - 0.9999) is 0 in floating point
    assert mask_size(0.005, 10_764_288) == 53_821


@pytest.mark.parametrize("density", [0.0, 2.0, -0.1])
def test_a_density_outside_its_range_is_refused_with_the_unit_explained(density: float) -> None:
    with pytest.raises(ConfigError, match=r"in \(0, 1\], got .*fraction of the entries in scope"):
        MaskConfig(density=density)


def test_a_weight_that_is_not_a_number_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'w' holds NaN"):
        build_mask({"w": torch.tensor([1.0, float("nan")])}, MaskConfig(density=0.5))
