"""The textbook loop with `labels=`, its gradients by chunks, and copies of an adapted model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from language_models import MODELS, model_of

import fedpet
from fedpet import LayerNormConfig, LoraConfig, MaskConfig, PetConfig, PetModel
from fedpet.training.token_loss import token_loss

TARGETS = {"gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"], "llama-tied": ["q_proj", "v_proj"]}


def adapted(name: str) -> PetModel:
    modules = [LayerNormConfig(), LoraConfig(r=2, target_modules=TARGETS[name])]
    config = PetConfig(mask=MaskConfig(density=0.1), modules=modules)
    return fedpet.get_pet_model(model_of(name), config)


def at_a_point(name: str, seed: int = 3) -> PetModel:
    pet = adapted(name)
    generator = torch.Generator().manual_seed(seed)
    pet.set_delta(0.05 * torch.randn(pet.num_values, generator=generator))
    return pet


def a_batch(labels: bool = True) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 20, (3, 9), generator=torch.Generator().manual_seed(1))
    attention = torch.ones_like(ids)
    attention[2, 5:] = 0
    batch = {"input_ids": ids, "attention_mask": attention}
    return {**batch, "labels": ids.masked_fill(attention == 0, -100)} if labels else batch


def loop(pet: Any, steps: int) -> list[float]:
    """Train as any textbook does."""
    optimizer = torch.optim.AdamW(pet.parameters(), lr=0.02)
    losses = []
    for _ in range(steps):
        loss = pet(**a_batch()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", MODELS)
def test_a_textbook_loop_with_labels_lowers_the_loss(name: str) -> None:
    pet = adapted(name)
    losses = loop(pet, steps=8)
    assert losses[-1] < losses[0]
    trained, every = pet.get_nb_trainable_parameters()
    assert trained < 0.5 * every


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunk_bytes", [1 << 25, 300])
def test_gradients_of_values_by_chunks_are_those_of_labels(name: str, chunk_bytes: int) -> None:
    pet = at_a_point(name)

    def gradients(loss: torch.Tensor) -> torch.Tensor:
        pet.zero_grad()
        loss.backward()
        return torch.cat([g.grad.flatten().clone() for g in pet.parameters() if g.grad is not None])

    expected = gradients(pet(**a_batch()).loss)
    inputs = a_batch()
    labels = inputs.pop("labels")
    found = gradients(token_loss(pet.model, inputs, labels, chunk_bytes=chunk_bytes))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_copy_and_a_saved_adapter_give_the_same_logits(tmp_path: Any) -> None:
    pet = at_a_point("llama-tied")
    pet.save_pretrained(tmp_path)
    again = PetModel.from_pretrained(model_of("llama-tied"), tmp_path)
    with torch.no_grad():
        expected = pet(**a_batch(labels=False)).logits
        for other in (again, copy.deepcopy(pet)):
            torch.testing.assert_close(other(**a_batch(labels=False)).logits, expected)
