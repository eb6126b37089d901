"""The mask's selection by stretches of the weights: the ranks of a sort of everything."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedpet.config import MaskConfig
from fedpet.errors import ConfigError
from fedpet.pet import mask as mask_module
from fedpet.pet.mask import build_mask, mask_size, rank_positions
from fedpet.utils.seeds import derive_seed


@pytest.fixture(autouse=True, scope="module")
def short_stretches() -> object:
    """Cut weights and sample so finely that small ones have many stretches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_module, "_STRETCH", 7)
        patch.setattr(mask_module, "_SAMPLE", 5)
        patch.setattr(mask_module, "_EVERY", 3)
        patch.setattr(mask_module, "_SPARE", 0)
        yield


def _sorted_whole(params: dict[str, Tensor], config: MaskConfig) -> dict[str, list[int]]:
    """Sort all scores at once, as the rule says it."""
    scores = []
    for name in sorted(params):
        size = params[name].numel()
        if config.rule == "random":
            generator = np.random.default_rng(derive_seed("mask", config.seed, name))
            scores.append(torch.from_numpy(generator.random(size, dtype=np.float32)))
        else:
            sign = 1 if config.rule == "smallest" else -1
            scores.append(sign * params[name].flatten().float().abs())
    owner = torch.cat([torch.full((len(s),), i) for i, s in enumerate(scores)])
    place = torch.cat([torch.arange(len(s)) for s in scores])
    num = mask_size(config.density, len(owner))
    order = torch.sort(torch.cat(scores), stable=True).indices[:num]
    ranked = {
        name: place[order][owner[order] == i].tolist() for i, name in enumerate(sorted(params))
    }
    return {name: chosen for name, chosen in ranked.items() if chosen}


_few_values = st.lists(st.sampled_from([0.0, -0.0, 0.5, -0.5, 2.0]), min_size=1, max_size=90)
_any_values = st.lists(st.floats(-1, 1, width=16), min_size=1, max_size=90)


@given(
    st.lists(st.one_of(_few_values, _any_values), min_size=1, max_size=4),
    st.sampled_from(["smallest", "largest", "random"]),
    st.sampled_from([0.02, 0.1, 0.3, 0.5, 0.9, 1.0]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.sampled_from(["global", "per-tensor"]),
)
def test_stretches_choose_and_rank_what_a_sort_of_all_entries_would(
    tensors: list[list[float]], rule: str, density: float, dtype: torch.dtype, granularity: str
) -> None:
    params = {f"w{i}": torch.tensor(entries, dtype=dtype) for i, entries in enumerate(tensors)}
    config = MaskConfig(density=density, rule=rule, granularity=granularity)
    expected: dict[str, list[int]] = {}
    if granularity == "global":
        expected = _sorted_whole(params, config)
    else:
        for name, tensor in params.items():
            expected |= _sorted_whole({name: tensor}, config)
    if not expected:
        with pytest.raises(ConfigError, match="nothing to train"):
            build_mask(params, config)
        return
    positions = build_mask(params, config).positions
    assert {name: chosen.tolist() for name, chosen in positions.items()} == expected
    shuffled = {name: chosen.flip(0) for name, chosen in positions.items()}
    ranked = rank_positions(params, shuffled, config)
    assert {name: chosen.tolist() for name, chosen in ranked.items()} == expected


def test_a_number_that_is_none_is_found_in_any_stretch() -> None:
    weight = torch.ones(100)
    for place in (0, 50, 99):
        for bad in (float("nan"), float("inf"), -float("inf")):
            broken = weight.clone()
            broken[place] = bad
            with pytest.raises(ConfigError, match="'w' holds NaN or infinity"):
                build_mask({"w": broken}, MaskConfig(density=0.1))
