"""Gradient checkpointing: blocks computed twice, and the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, backbone, batch, gradient_of, moved_pet
from torch import nn

from fedpet.backbone.module_roles import find_target_modules
from fedpet.errors import ConfigError
from fedpet.training.block_checkpointing import check_checkpointing, checkpoint_blocks
from fedpet.training.cls_only import first_token_only

KINDS = "lora+lnfit"
UNSUPPORTED = ("mpnet", "albert")  # by transformers


def _count(model: nn.Module) -> list[int]:
    """Count the calls of a layer of the first block."""
    calls = [0]
    name = next(p.name for p in find_target_modules(model) if p.kind == "norm" and p.layer == 0)

    def one_more(*_: Any) -> None:
        calls[0] += 1

    model.get_submodule(name).register_forward_pre_hook(one_more)
    return calls


@pytest.mark.parametrize("density", [0.05, 0.5])
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in UNSUPPORTED])
def test_blocks_are_computed_twice_and_gradients_are_the_same_bits(
    name: str, density: float
) -> None:
    pet, inputs = moved_pet(backbone(name), KINDS, density), batch(name)
    expected, once = gradient_of(pet, inputs), _count(pet.model)
    gradient_of(pet, inputs)
    first = once[0]
    checkpoint_blocks(pet.model)
    assert not pet.model.training  # dropout stays off
    assert torch.equal(gradient_of(pet, inputs), expected)
    assert once[0] == 3 * first
    pet.model.eval()
    assert torch.equal(gradient_of(pet, inputs), expected)
    assert once[0] == 4 * first


def test_passes_cut_to_the_first_token_are_checkpointed_too() -> None:
    pet, inputs = moved_pet(backbone("bert"), KINDS), batch("bert")
    with first_token_only(pet.model, inputs):
        expected = gradient_of(pet, inputs)
        checkpoint_blocks(pet.model)
        assert torch.equal(gradient_of(pet, inputs), expected)


def test_dropout_draws_the_same_when_a_block_is_computed_again() -> None:
    gradients = []
    for checkpointed in (False, True):
        pet = moved_pet(backbone("bert"), KINDS)
        pet.model.train()
        if checkpointed:
            checkpoint_blocks(pet.model)
        torch.manual_seed(5)
        gradients.append(gradient_of(pet, batch("bert")))
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_model_that_cannot_is_refused_with_the_key(name: str) -> None:
    model = backbone(name).model
    with pytest.raises(
        ConfigError, match=rf"training.gradient-checkpointing needs .*{type(model).__name__} is"
    ):
        check_checkpointing(model)
