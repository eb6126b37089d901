"""The laws of the PET modules on one pretrained model, as a sequence of checks."""

from __future__ import annotations

import torch
from architectures import structure_of, train

from fedpet.backbone.module_roles import maskable_weights
from fedpet.backbone.pretrained import Backbone
from fedpet.config import MaskConfig
from fedpet.pet.mask import build_mask
from fedpet.pet.model import PetModel

EXACT = "lnfit+bitfit+lora+hiwi-bias+hiwi-weight"
ALL = f"{EXACT}+ln-bias+lora-factors+lowrank-adapter"
CASES = ("none", "lnfit+bitfit+ln-bias+pooler-bias", "lora", "hiwi-bias+hiwi-weight", ALL)


def without_absent(base: Backbone, names: str) -> str:
    """The presets that this backbone has something for: a bias of a pooler, of all of them."""
    pooled = any(name.endswith("pooler.dense.bias") for name, _ in base.model.named_parameters())
    return names if pooled else names.replace("+pooler-bias", "")


def check_laws(base: Backbone, names: str) -> None:
    """Merge, untouched entries, names, shapes and tree, and values in and out; then take all off.

    Args:
        base: A pretrained model; as it was afterwards.
        names: Presets beside a mask of half a percent.
    """
    before = {key: value.clone() for key, value in base.model.state_dict().items()}
    tree = [(name, type(module)) for name, module in base.model.named_modules()]
    mask = build_mask(maskable_weights(base.model, base.head), MaskConfig(density=0.005))
    structure = structure_of(base, without_absent(base, names), rank=8)
    pet = PetModel(base, mask, structure, seed=0)
    try:
        ids = torch.randint(1000, 20000, (2, 12), generator=torch.Generator().manual_seed(0))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        train(pet, inputs, steps=2, rate=1e-3)
        merged = pet.merged()
        with torch.no_grad():
            served, adapted = merged(**inputs).logits, pet.model(**inputs).logits
        assert (served - adapted).abs().max() <= 1e-5
        assert type(merged) is type(base.model)
        if "adapter" not in names:
            shapes = [(key, value.shape) for key, value in merged.state_dict().items()]
            assert shapes == [(key, value.shape) for key, value in before.items()]
            assert [(name, type(module)) for name, module in merged.named_modules()] == tree
        values = pet.get_delta()
        pet.set_delta(values, seed=4)
        assert torch.equal(pet.get_delta(), values)
        for name, positions in mask.positions.items():
            same = pet.model.get_parameter(name).flatten() == before[name].flatten()
            same[positions] = True
            assert bool(same.all()), name
        if not pet.inexact_kinds:
            _check_average(pet, values)
    finally:
        pet.unload()
    after = base.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def _check_average(pet: PetModel, first: torch.Tensor) -> None:
    """Averaging values is averaging merged models, to 1e-6."""
    second = 1e-3 * torch.randn(len(first), generator=torch.Generator().manual_seed(1))
    mean: dict[str, torch.Tensor] = {}
    for values in (first, second):
        pet.set_delta(values, seed=0)
        for key, parameter in pet.merged().named_parameters():
            mean[key] = mean.get(key, 0) + parameter / 2
    pet.set_delta((first + second) / 2, seed=0)
    for key, parameter in pet.merged().named_parameters():
        assert (parameter - mean[key]).abs().max() <= 1e-6, key
