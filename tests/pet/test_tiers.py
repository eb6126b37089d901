"""Tiers: nested in the mask, each the model of its own density, drawn alike on all sides."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from architectures import backbone, batch, structure_of, train
from hypothesis import given
from hypothesis import strategies as st

from fedpet.backbone.module_roles import maskable_weights
from fedpet.config import MaskConfig
from fedpet.errors import ConfigError, PlanError, StructureError
from fedpet.pet.mask import Mask, build_mask
from fedpet.pet.model import PetModel
from fedpet.pet.tiers import draw_tier, largest_tier, tier_positions, tiers_of
from fedpet.utils.seeds import client_id64

THREE = MaskConfig(density=0.2, tiers=("0.01=0.3", "0.05=0.5", "0.2=0.2"))


def model(name: str, config: MaskConfig, preset: str = "lora+lnfit") -> PetModel:
    base = backbone(name)
    mask = build_mask(maskable_weights(base.model, base.head), config)
    return PetModel(base, mask, structure_of(base, preset), seed=7)


# -- nested ----------------------------------------------------------------------------------


@given(
    st.lists(st.sampled_from([0.0, 0.1, -0.1, 0.2, -0.3, 0.5]), min_size=20, max_size=60),
    st.lists(st.floats(-1, 1, width=32), min_size=20, max_size=60),
    st.sampled_from(["smallest", "largest", "random"]),
    st.sampled_from(["global", "per-tensor"]),
)
def test_a_tier_is_the_mask_of_its_density_also_where_magnitudes_tie(
    first: list[float], second: list[float], rule: str, granularity: str
) -> None:
    params = {"x": torch.tensor(first), "y": torch.tensor(second)}
    config = MaskConfig(
        density=0.5, rule=rule, granularity=granularity, tiers=("0.1=0.5", "0.3=0.25", "0.5=0.25")
    )
    mask = build_mask(params, config)
    for counts, density in zip(mask.tiers, config.tier_densities, strict=True):
        alone = build_mask(params, replace(config, density=density, tiers=()))
        prefixes = {name: mask.positions[name][:count] for name, count in counts.items()}
        for name, positions in prefixes.items():
            assert torch.equal(positions, alone.positions.get(name, positions[:0]))
        assert sum(counts.values()) == alone.num_values


def test_the_positions_of_a_tier_are_nested_and_its_other_values_are_those_of_all() -> None:
    tiers = tiers_of(model("bert", THREE), THREE)
    assert [tier.density for tier in tiers] == [0.01, 0.05, 0.2]
    every = np.arange(tiers[-1].count)
    for weaker, stronger in itertools.pairwise(tiers):
        assert set(every[weaker.where]) < set(every[stronger.where])
    assert np.array_equal(every[tiers[-1].where], every)
    for tier in tiers:
        assert len(every[tier.where]) == tier.count
        assert (np.diff(every[tier.where]) > 0).all()
        assert tier.groups[-1][1] == tier.count


def test_without_tiers_there_is_one_and_it_holds_everything() -> None:
    config = MaskConfig(density=0.05)
    pet = model("bert", config)
    [tier] = tiers_of(pet, config)
    assert tier.count == pet.num_values
    assert (tier.density, tier.share) == (0.05, 1.0)


def test_layouts_that_are_not_nested_are_refused() -> None:
    weak, _, strong = model("bert", THREE).tiers
    with pytest.raises(StructureError, match="must be nested in the full layout"):
        tier_positions(weak, strong)
    shorter = [replace(s, size=s.size - (s.kind == "lora")) for s in weak]
    with pytest.raises(StructureError, match="differs in its mask alone"):
        tier_positions(strong, shorter)


# -- the model of a tier ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "albert", "t5", "gpt2"])
def test_at_a_tier_the_model_is_that_of_a_mask_of_this_density_alone(name: str) -> None:
    """To the bit: layout, values, every tensor, after training and after other tiers."""
    inputs = batch(name)
    pet = model(name, THREE)
    for tier in (2, 0, 1, 0, 2):
        alone = model(name, MaskConfig(density=THREE.tier_densities[tier]))
        pet.set_tier(tier)
        assert pet.segments == alone.segments
        assert not pet.get_delta().any()
        values = 0.05 * torch.randn(alone.num_values)
        pet.set_delta(values, seed=3)
        alone.set_delta(values, seed=3)
        assert train(pet, inputs, steps=3) == train(alone, inputs, steps=3)
        assert torch.equal(pet.get_delta(), alone.get_delta())
        merged = pet.merged().state_dict()
        for key, value in alone.merged().state_dict().items():
            assert torch.equal(merged[key], value), key


def test_training_at_a_tier_leaves_the_rest_of_the_mask_at_the_checkpoint_to_the_bit() -> None:
    pet = model("bert", THREE)
    before = {key: value.clone() for key, value in backbone("bert").model.state_dict().items()}
    mask = build_mask(maskable_weights(backbone("bert").model, backbone("bert").head), THREE)
    pet.set_delta(0.1 * torch.randn(pet.num_values), seed=0)  # the whole mask has moved
    pet.set_tier(0)
    train(pet, batch("bert"), steps=20)
    moved = 0
    for key, positions in mask.positions.items():
        changed = (pet.model.state_dict()[key] != before[key]).flatten()
        outside = torch.ones(len(changed), dtype=torch.bool)
        outside[positions[: mask.tiers[0][key]]] = False
        assert not changed[outside].any(), key
        moved += int(changed.sum())
    assert moved > 0.9 * sum(mask.tiers[0].values())


def test_values_of_a_tier_and_the_same_among_zeros_are_one_model() -> None:
    pet = model("bert", THREE)
    tiers = tiers_of(pet, THREE)
    values = torch.randn(tiers[1].count)
    pet.set_tier(1)
    pet.set_delta(values, seed=0)
    at_tier = {key: value.clone() for key, value in pet.model.state_dict().items()}
    pet.set_tier(2)
    among_zeros = torch.zeros(pet.num_values)
    among_zeros.numpy()[tiers[1].where] = values
    pet.set_delta(among_zeros, seed=0)
    assert all(torch.equal(value, at_tier[key]) for key, value in pet.model.state_dict().items())


def test_a_tier_computes_no_gradient_where_its_mask_is_empty() -> None:
    """The mask of one tier lies in one layer: the others are plain, and keep nothing."""
    base = backbone("bert")
    scope = maskable_weights(base.model, base.head)
    low, high = next(iter(scope)), list(scope)[-1]
    positions = {name: torch.arange(30) for name in sorted((low, high))}
    tiers = ({low: 0, high: 10}, {low: 30, high: 30})
    mask = Mask(positions, {name: w.numel() for name, w in scope.items()}, tiers)
    pet = PetModel(base, mask, structure_of(base, "none"), seed=0)
    pet.set_tier(0)
    assert [s.name for s in pet.segments if s.kind == "mask"] == [high]
    layer = pet.model.get_submodule(low.removesuffix(".weight"))
    outputs = []
    layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    for tier in (0, 1):
        pet.set_tier(tier)
        pet.model(**batch("bert"))
        assert outputs.pop().requires_grad == bool(tier)


# -- whose tier ------------------------------------------------------------------------------


def test_tiers_are_drawn_by_the_name_alone_and_in_their_shares() -> None:
    clients = [client_id64(f"client {index}") for index in range(4000)]
    drawn = [draw_tier(THREE, client) for client in clients]
    assert drawn == [draw_tier(replace(THREE, rule="largest"), client) for client in clients]
    shares = np.bincount(drawn, minlength=3) / len(drawn)
    assert shares == pytest.approx([0.3, 0.5, 0.2], abs=0.03)
    other = [draw_tier(replace(THREE, seed=1), client) for client in clients]
    assert other != drawn


def test_a_tier_of_no_share_is_drawn_for_nobody() -> None:
    config = replace(THREE, tiers=("0.01=0", "0.05=1", "0.2=0"))
    assert {draw_tier(config, client_id64(str(index))) for index in range(500)} == {1}
    assert draw_tier(MaskConfig(), 5) == draw_tier(None, 5) == 0


def test_a_node_trains_the_largest_tier_that_it_can() -> None:
    within = [largest_tier(THREE, most) for most in (0.01, 0.03, 0.05, 0.2, 1.0)]
    assert within == [0, 0, 1, 2, 2]
    assert largest_tier(MaskConfig(density=0.01), 0.5) == 0
    with pytest.raises(
        PlanError, match=r"at most 0\.001 \(max-density\), the plan's least is 0\.01"
    ):
        largest_tier(THREE, 0.001)


@pytest.mark.parametrize(
    ("tiers", "message"),
    [
        (("0.05",), "entries such as '0.005=0.3'"),
        (("0.05=half",), "entries such as '0.005=0.3'"),
        (("5=1",), "entries such as '0.005=0.3'"),
        (("0.01=0.3", "0.05=0.3"), r"add up to 1, got 0\.6"),
        (("0.01=0.3", "0.02=0.7"), r"largest of mask.tiers must be mask.density, which is 0\.05"),
        (("0.05=0.5", "0.05=0.5"), "distinct densities"),
        (tuple(f"0.0{n}=0" for n in range(10, 30)), "at most 16"),
    ],
)
def test_tiers_that_make_no_sense_are_refused(tiers: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MaskConfig(density=0.05, tiers=tiers)


def test_tiers_that_round_down_to_the_same_entries_are_refused() -> None:
    config = MaskConfig(density=0.11, tiers=("0.1=0.5", "0.11=0.5"))
    with pytest.raises(ConfigError, match=r"more entries than the one below it, got \[1, 1\]"):
        build_mask({"w": torch.arange(10.0)}, config)
