"""Weights that processes share: the same bits as weights written in place, and never written."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from architectures import ARCHITECTURES, backbone, batch, loss_of, mask_of, structure_of, train
from torch import Tensor

from fedpet.backbone.module_roles import maskable_weights
from fedpet.config import MaskConfig
from fedpet.pet.mask import build_mask
from fedpet.pet.model import PetModel
from fedpet.training.cls_only import first_token_only


def _pair(
    name: str, density: float = 0.1, dtype: torch.dtype = torch.float32
) -> tuple[PetModel, PetModel]:
    """A model whose weights are written, and one whose weights are shared."""
    pair = []
    for shared in (False, True):
        base = replace(backbone(name, dtype), shared=shared)
        structure = structure_of(base, "lora+lnfit")
        pet = PetModel(base, mask_of(base, density), structure, seed=7)
        generator = torch.Generator().manual_seed(3)
        pet.set_delta(0.05 * torch.randn(pet.num_values, generator=generator), seed=1)
        pair.append(pet)
    return pair[0], pair[1]


def _weights(pet: PetModel) -> dict[str, Tensor]:
    assert pet.mask is not None
    return {name: pet.model.get_parameter(name) for name in pet.mask.positions}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("density", [0.01, 0.5])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_gives_the_same_bits_and_writes_no_weight(
    name: str, density: float, dtype: torch.dtype
) -> None:
    written, shared = _pair(name, density, dtype)
    before = {key: weight.clone() for key, weight in _weights(shared).items()}
    places = {key: weight.data_ptr() for key, weight in _weights(shared).items()}
    inputs = batch(name)
    losses = [train(pet, inputs, steps=3) for pet in (written, shared)]
    assert losses[0] == losses[1]
    assert torch.equal(written.get_delta(), shared.get_delta())
    for key, weight in _weights(shared).items():
        assert torch.equal(weight, before[key]), key
        assert weight.data_ptr() == places[key]
    with torch.no_grad():
        outputs = [pet.model(**inputs).logits for pet in (written, shared)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("name", ["bert", "gpt2", "albert", "llama"])
def test_they_merge_to_the_same_plain_model(name: str, copied: bool) -> None:
    states = []
    for pet in _pair(name):
        plain = pet.merged() if copied else pet.merge_and_unload()
        states.append(plain.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_passes_cut_to_the_first_token_give_the_same_bits() -> None:
    gradients = []
    for pet in _pair("bert"):
        inputs = batch("bert")
        with first_token_only(pet.model, inputs):
            loss_of(pet.model, inputs).backward()
        gradients.append(torch.cat([group.grad.flatten() for group in pet.parameters()]))
    assert float(gradients[0].abs().max()) > 0
    assert torch.equal(*gradients)


def test_tiers_give_the_same_bits() -> None:
    outputs = []
    for shared in (False, True):
        base = replace(backbone("bert"), shared=shared)
        config = MaskConfig(density=0.1, tiers=("0.02=0.5", "0.1=0.5"))
        mask = build_mask(maskable_weights(base.model, base.head), config)
        pet = PetModel(base, mask, structure_of(base, "lnfit"), seed=0)
        pet.set_tier(0)
        pet.set_delta(0.05 * torch.ones(pet.num_values))
        outputs.append(pet.model(**batch("bert")).logits)
    assert torch.equal(*outputs)


def test_unloading_gives_the_checkpoint_back() -> None:
    _, shared = _pair("bert")
    plain = backbone("bert").model.state_dict()
    assert all(torch.equal(v, plain[k]) for k, v in shared.unload().state_dict().items())
