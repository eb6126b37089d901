"""The laws of the PET modules, each module on each architecture."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from architectures import (
    ARCHITECTURES,
    backbone,
    batch,
    biases_of_norms,
    mask_of,
    structure_of,
    train,
)
from torch import Tensor

from fedpet.pet.model import PetModel
from fedpet.pet.structure import PRESETS, Structure

EVERYTHING = "lnfit+bitfit+ln-bias+lora+hiwi-bias+hiwi-weight"
INEXACT = ("lora-factors", "lowrank-adapter")
KINDS = ("mask", "bias of norms", *PRESETS)


def _pet(name: str, kind: str, *, seed: int = 7) -> PetModel:
    """The architecture with modules of one kind."""
    base = backbone(name)
    if kind == "mask":
        return PetModel(base, mask_of(base), Structure(), seed=seed)
    structure = biases_of_norms(base) if "norms" in kind else structure_of(base, kind)
    return PetModel(base, None, structure, seed=seed)


def _carries(name: str, kind: str) -> bool:
    """Tell if an architecture has something for a kind to act on."""
    no_biases = name in ("t5", "t5-gated", "llama")
    if kind in ("bitfit", "ln-bias", "hiwi-bias"):
        return not no_biases
    return {"pooler-bias": name in ("bert", "albert"), "added-bias": no_biases}.get(kind, True)


PRESENT = [
    pytest.param(name, kind, id=f"{name}-{kind}")
    for name, kind in itertools.product(ARCHITECTURES, KINDS)
    if _carries(name, kind)
]


def _tree(model: torch.nn.Module) -> dict[str, str]:
    return {name: type(module).__name__ for name, module in model.named_modules()}


def _shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize(("name", "kind"), PRESENT)
def test_the_merged_model_is_plain_and_gives_the_adapted_outputs(name: str, kind: str) -> None:
    plain = backbone(name).model
    inputs = batch(name)
    with torch.no_grad():
        pretrained = plain(**inputs).logits
    pet = _pet(name, kind)
    pet.set_delta(0.3 * torch.randn(pet.num_values), seed=1)
    train(pet, inputs, steps=2, rate=1e-2)
    adapted = pet.model(**inputs).logits  # with a graph: the forward that training sees
    merged = pet.merged()
    with torch.no_grad():
        served = merged(**inputs).logits
        quiet = pet.model(**inputs).logits
    assert (adapted - pretrained).abs().max() > 1e-3, "the modules did nothing"
    scale = served.abs().max().clamp(min=1.0)
    assert (served - adapted).abs().max() <= 1e-5 * scale
    assert (served - quiet).abs().max() <= 1e-5 * scale

    assert type(merged) is type(plain)
    added = set(pet.added_parameters)
    assert set(_shapes(merged)) - set(_shapes(plain)) == added
    assert {k: v for k, v in _shapes(merged).items() if k not in added} == _shapes(plain)
    assert bool(added) == (
        kind in ("lowrank-adapter", "added-bias") or _adds_norm_biases(name, kind)
    )
    if not added:
        assert _tree(merged) == _tree(plain)
    assert not any("forward" in vars(module) for module in merged.modules())
    assert not any(p.requires_grad for p in merged.parameters())


def _adds_norm_biases(name: str, kind: str) -> bool:
    return kind == "bias of norms" and name in ("t5", "t5-gated", "llama")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_everything_together_merges_as_well(name: str) -> None:
    base = backbone(name)
    wanted = [kind for kind in EVERYTHING.split("+") if _carries(name, kind)]
    pet = PetModel(base, mask_of(base), structure_of(base, "+".join(wanted)), seed=7)
    inputs = batch(name)
    losses = train(pet, inputs, steps=8, rate=3e-3)
    assert losses[-1] < losses[0]
    with torch.no_grad():
        served = pet.merged()(**inputs).logits
        adapted = pet.model(**inputs).logits
    assert (served - adapted).abs().max() <= 1e-5 * served.abs().max().clamp(min=1.0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_not_named_stays_bit_identical_through_fifty_steps(name: str) -> None:
    base = backbone(name)
    before = {key: value.clone() for key, value in base.model.state_dict().items()}
    mask = mask_of(base, 0.05)
    pet = PetModel(base, mask, structure_of(base, "lnfit"), seed=7)
    gains = {f"{spec.target}.weight" for spec in structure_of(backbone(name), "lnfit").modules}
    inputs = batch(name)
    train(pet, inputs, steps=50, rate=1e-3)
    for source in (pet.model, pet.merged()):
        moved = 0
        for key, value in source.state_dict().items():
            same = value == before[key]
            if key in gains or key in base.head:
                moved += int((~same).sum())
            elif key in mask.positions:
                outside = torch.ones(value.numel(), dtype=torch.bool)
                outside[mask.positions[key]] = False
                assert bool(same.flatten()[outside].all()), key
                moved += int((~same).sum())
            else:
                assert bool(same.all()), key
        assert moved > 0.9 * mask.num_values
    pet.unload()
    after = base.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


EXACT = [case for case in PRESENT if case.values[1] not in INEXACT]


@pytest.mark.parametrize(("name", "kind"), EXACT)
def test_averaging_values_is_averaging_merged_models(name: str, kind: str) -> None:
    pet = _pet(name, kind)
    first, second, mean_of_merged = _two_clients(pet, batch(name))
    pet.set_delta(0.25 * first + 0.75 * second, seed=5)
    merged_of_mean = dict(pet.merged().named_parameters())
    for key, parameter in mean_of_merged.items():
        assert (merged_of_mean[key] - parameter).abs().max() <= 1e-6, key
    assert pet.inexact_kinds == ()


def _two_clients(pet: PetModel, inputs: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Values of two clients that start alike, and the mean of their merged models."""
    start = 0.05 * torch.randn(pet.num_values)
    values, merged = [], []
    for client in range(2):
        pet.set_delta(start, seed=10 + client)
        train(pet, inputs, steps=3, rate=5e-3 * (client + 1))
        values.append(pet.get_delta())
        merged.append(dict(pet.merged().named_parameters()))
    mean = {key: 0.25 * merged[0][key] + 0.75 * merged[1][key] for key in merged[0]}
    return values[0], values[1], mean


@pytest.mark.parametrize("kind", INEXACT)
def test_averaging_factors_is_not_averaging_models_and_says_so(kind: str) -> None:
    base, inputs = backbone("bert"), batch("bert")
    pet = PetModel(base, None, structure_of(base, kind, rank=4), seed=7)
    assert pet.inexact_kinds == (kind,)
    values, outputs, weights = [], [], []
    for _client in range(2):
        values.append(0.3 * torch.randn(pet.num_values))
        pet.set_delta(values[-1], seed=0)
        weights.append(dict(pet.merged().named_parameters()))
        outputs.append(pet.model(**inputs).logits)
    pet.set_delta((values[0] + values[1]) / 2, seed=0)
    if kind == "lora-factors":
        mean = dict(pet.merged().named_parameters())
        key = "bert.encoder.layer.0.attention.self.query.weight"
        assert (mean[key] - (weights[0][key] + weights[1][key]) / 2).abs().max() > 1e-2
    else:
        assert (pet.model(**inputs).logits - (outputs[0] + outputs[1]) / 2).abs().max() > 1e-4
