"""Frozen weights in bfloat16: values, gradients, heads and norms float32, the laws in tolerance."""

from __future__ import annotations

import pytest
import torch
from architectures import (
    ARCHITECTURES,
    backbone,
    batch,
    gradient_of,
    loss_of,
    mask_of,
    moved_pet,
    structure_of,
    train,
)

from fedpet.backbone.module_roles import find_target_modules
from fedpet.backbone.pretrained import Backbone
from fedpet.pet.model import PetModel

KINDS = "lnfit+bitfit+ln-bias+lora+hiwi-bias+hiwi-weight+lora-factors+lowrank-adapter"
ROUNDING = 2.0**-7  # of a bfloat16, relative


def _pair(name: str) -> tuple[Backbone, Backbone]:
    """The same weights in bfloat16 and in float32."""
    low, high = backbone(name, torch.bfloat16), backbone(name)
    high.model.load_state_dict(low.model.state_dict())
    return low, high


def _kinds(base: Backbone, wanted: str) -> str:
    """Select the kinds that this architecture has targets for."""
    biased = any(p.has_bias and p.kind != "norm" for p in find_target_modules(base.model))
    normed = any(p.has_bias and p.kind == "norm" for p in find_target_modules(base.model))
    absent = set() if biased else {"bitfit", "hiwi-bias"}
    absent |= set() if normed else {"ln-bias"}
    return "+".join(kind for kind in wanted.split("+") if kind not in absent)


def _adapt(base: Backbone, kinds: str = KINDS, density: float = 0.1) -> PetModel:
    return moved_pet(base, _kinds(base, kinds), density)


@pytest.mark.parametrize("density", [0.1, 0.5])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_and_gradients_are_those_of_float32_up_to_rounding(
    name: str, density: float
) -> None:
    low, high = (_adapt(base, density=density) for base in _pair(name))
    inputs = batch(name)
    exact, rounded = high.model(**inputs).logits, low.model(**inputs).logits
    assert (rounded - exact).norm() <= 8 * ROUNDING * exact.norm()
    expected, gradient = gradient_of(high, inputs), gradient_of(low, inputs)
    assert gradient.dtype == low.get_delta().dtype == torch.float32
    assert torch.cosine_similarity(gradient, expected, dim=0) > 0.99


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_merged_model_is_plain_bfloat16_with_the_adapted_outputs(name: str) -> None:
    base = backbone(name, torch.bfloat16)
    before = {key: (value.shape, value.dtype) for key, value in base.model.state_dict().items()}
    pet, inputs = _adapt(base, KINDS.removesuffix("+lowrank-adapter")), batch(name)
    losses = train(pet, inputs, steps=6, rate=3e-3)
    assert losses[-1] < losses[0]
    merged = pet.merged()
    assert {k: (v.shape, v.dtype) for k, v in merged.state_dict().items()} == before
    if name == "vit":  # the plain model takes its pictures in its own type
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with torch.no_grad():
        served, adapted = merged(**inputs).logits.float(), pet.model(**inputs).logits
        assert (served - adapted).norm() <= 8 * ROUNDING * adapted.norm()
        in_place = pet.merge_and_unload()
        assert torch.equal(in_place(**inputs).logits.float(), served)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_what_no_module_names_stays_bit_identical_and_unloading_restores_the_rest(
    name: str,
) -> None:
    base = backbone(name, torch.bfloat16)
    before = {key: value.clone() for key, value in base.model.state_dict().items()}
    pet = _adapt(base, "lnfit", density=0.05)
    train(pet, batch(name), steps=20, rate=1e-2)
    gains = {f"{module.target}.weight" for module in pet.structure_modules}
    for key, value in pet.model.state_dict().items():
        same = (value == before[key]).flatten()
        if key in base.head or key in gains:
            continue
        if pet.mask is not None and key in pet.mask.positions:
            assert not bool(same.all())
            same[pet.mask.positions[key]] = True
        assert bool(same.all()), key
    pet.unload()
    after = base.model.state_dict()
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    assert all(value.dtype == torch.bfloat16 for value in after.values())


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_change_too_small_for_a_bfloat16_weight_is_kept_and_sent(name: str) -> None:
    base = backbone(name, torch.bfloat16)
    pet = PetModel(base, mask_of(base), structure_of(base, "lnfit"), seed=0)
    values = 1e-6 * torch.randn(pet.num_values, generator=torch.Generator().manual_seed(0))
    pet.set_delta(values)
    assert torch.equal(pet.get_delta(), values)
    pet.model(**batch(name))  # refreshes
    assert torch.equal(pet.get_delta(), values)
    optimiser = torch.optim.SGD(pet.parameters(), lr=1.0)
    pet.zero_grad()
    for group in pet.parameters():
        group.grad.fill_(-1e-6)
    for _ in range(3):
        optimiser.step()
        pet.after_step()
    torch.testing.assert_close(pet.get_delta(), values + 3e-6, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_gates_of_a_search_take_gradients_of_float32(name: str) -> None:
    gradients = []
    for base in _pair(name):
        pet = _adapt(base)
        gates = torch.full((len(pet.structure_modules),), 0.7, requires_grad=True)
        pet.set_gates(gates)
        loss_of(pet.model, batch(name, seed=1)).backward()
        assert gates.grad is not None
        gradients.append(gates.grad.clone())
        pet.set_gates(None)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99
