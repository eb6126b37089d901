"""Laws 1, 2 and 3 on causal language models, and the textbook loop with `labels=`."""

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


def parameters_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_the_merged_model_is_the_pretrained_one_s_kind_with_the_adapted_logits(name: str) -> None:
    plain, pet = model_of(name), at_a_point(name)
    with torch.no_grad():
        expected = pet(**a_batch(labels=False)).logits
        merged: Any = pet.merge_and_unload()
        found = merged(**a_batch(labels=False)).logits
    assert type(merged) is type(plain)
    assert {n: p.shape for n, p in merged.named_parameters()} == {
        n: p.shape for n, p in plain.named_parameters()
    }
    assert [*merged.state_dict()] == [*plain.state_dict()]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_not_named_stays_the_checkpoint_s_to_the_bit(name: str) -> None:
    plain, pet = model_of(name), adapted(name)
    loop(pet, steps=3)
    before, after = parameters_of(plain), parameters_of(pet.merge_and_unload())
    dense = [module for module, m in plain.named_modules() if hasattr(m, "weight")]
    touched = {n for n in before if not torch.equal(before[n], after[n])}
    assert touched
    for key in before:
        if any(word in key for word in ("embed", "lm_head", "wte", "wpe")):
            assert key not in touched
    assert {key.rpartition(".")[0] for key in touched} <= set(dense)
    moved = sum(int((before[n] != after[n]).sum()) for n in touched if "norm" not in n)
    assert moved < 0.5 * sum(p.numel() for p in before.values())


@pytest.mark.parametrize("name", MODELS)
def test_averaging_values_is_averaging_models(name: str) -> None:
    config = PetConfig(mask=MaskConfig(density=0.1), modules=[LayerNormConfig()])
    shares, deltas, models = (0.25, 0.75), [], []
    for seed in (1, 2):
        pet = fedpet.get_pet_model(model_of(name), config)
        generator = torch.Generator().manual_seed(seed)
        pet.set_delta(0.1 * torch.randn(pet.num_values, generator=generator))
        deltas.append(pet.get_delta())
        models.append(parameters_of(pet.merged()))
    pet = fedpet.get_pet_model(model_of(name), config)
    pet.set_delta(sum(share * delta for share, delta in zip(shares, deltas, strict=True)))
    for key, found in parameters_of(pet.merged()).items():
        expected = sum(share * model[key] for share, model in zip(shares, models, strict=True))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


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
