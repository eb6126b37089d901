"""Laws 1, 2, 3, gradients and the loss of transformers, for every task and architecture."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from law_cases import CASES, GENERATORS, Case, case_of
from torch import Tensor

import fedpet
from fedpet import LayerNormConfig, LoraConfig, MaskConfig, PetConfig, PetModel
from fedpet.data import Rows, Task
from fedpet.tasks import kind_of
from fedpet.training.token_loss import token_loss

NAMES = tuple(CASES)


def pet_of(case: Case, *, lora: bool = True) -> PetModel:
    modules: list[Any] = [LayerNormConfig()]
    if lora:
        modules.append(LoraConfig(r=2, target_modules=case.targets))
    config = PetConfig(mask=MaskConfig(density=0.1), modules=modules)
    return fedpet.get_pet_model(case.model, config)


def at_a_point(name: str) -> tuple[Case, PetModel]:
    case = case_of(name)
    pet = pet_of(case)
    generator = torch.Generator().manual_seed(3)
    pet.set_delta(0.05 * torch.randn(pet.num_values, generator=generator))
    return case, pet


def loss_of(case: Case) -> Any:
    labels = np.zeros(3, dtype=np.int64)
    task = Task(case.task, ("a", "b", "c"), "")
    return kind_of(case.task).client_loss(task, labels, 0.0, torch.device("cpu"))


def logits_of(model: Any, case: Case) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**case.inputs).logits
    return found


def parameters_of(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", NAMES)
def test_the_merged_model_is_of_the_same_kind_with_the_adapted_logits(name: str) -> None:
    plain, (case, pet) = case_of(name).model, at_a_point(name)
    expected = logits_of(pet, case)
    assert not torch.allclose(expected, logits_of(plain, case), atol=1e-3)
    merged: Any = pet.merge_and_unload()
    assert type(merged) is type(plain)
    assert [*merged.state_dict()] == [*plain.state_dict()]
    assert {n: p.shape for n, p in merged.named_parameters()} == {
        n: p.shape for n, p in plain.named_parameters()
    }
    torch.testing.assert_close(logits_of(merged, case), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", GENERATORS)
def test_the_merged_model_writes_the_tokens_of_the_adapted_one(name: str) -> None:
    case, pet = at_a_point(name)
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 1}
    prompt = {key: x[:1] for key, x in case.inputs.items() if not key.startswith("decoder_")}
    before = case_of(name).model.generate(**prompt, **options)
    adapted: Any = pet.model
    expected = adapted.generate(**prompt, **options)
    merged: Any = pet.merge_and_unload()
    assert torch.equal(merged.generate(**prompt, **options), expected)
    if name in ("llama", "llama-tied", "gpt2"):
        assert not torch.equal(before, expected)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_named_stays_the_checkpoint_s_to_the_bit(name: str) -> None:
    plain, case = case_of(name).model, case_of(name)
    pet = pet_of(case, lora=False)
    before, chosen = parameters_of(plain), pet.mask
    assert chosen is not None
    optimizer = torch.optim.AdamW([p for p in pet.parameters() if p.requires_grad], lr=0.02)
    for _ in range(2):
        loss = loss_of(case)(pet.model, case.inputs, case.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    named = {segment.name for segment in pet.segments}
    after = parameters_of(pet.merge_and_unload())
    moved = 0
    for key, start in before.items():
        changed = (after[key] != start).flatten()
        moved += int(changed.sum())
        if key in chosen.positions:
            changed[chosen.positions[key]] = False
        elif key.rpartition(".")[0] in named or key in named:
            continue
        assert not changed.any(), key
    assert moved


@pytest.mark.parametrize("name", NAMES)
def test_averaging_values_is_averaging_models(name: str) -> None:
    shares, deltas, models = (0.25, 0.75), [], []
    for seed in (1, 2):
        pet = pet_of(case_of(name), lora=False)
        generator = torch.Generator().manual_seed(seed)
        pet.set_delta(0.1 * torch.randn(pet.num_values, generator=generator))
        deltas.append(pet.get_delta())
        models.append(parameters_of(pet.merged()))
    pet = pet_of(case_of(name), lora=False)
    pet.set_delta(sum(share * delta for share, delta in zip(shares, deltas, strict=True)))
    for key, found in parameters_of(pet.merged()).items():
        expected = sum(share * model[key] for share, model in zip(shares, models, strict=True))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_those_of_labels(name: str) -> None:
    case, pet = at_a_point(name)
    inputs = {key: x for key, x in case.inputs.items() if key != "decoder_input_ids"}

    def gradients(loss: Tensor) -> Tensor:
        pet.zero_grad()
        loss.backward()
        return torch.cat([g.grad.flatten().clone() for g in pet.parameters() if g.grad is not None])

    theirs = pet(**inputs, labels=case.theirs).loss
    ours = loss_of(case)(pet.model, case.inputs, case.labels)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    torch.testing.assert_close(gradients(ours), gradients(theirs), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1 << 25, 100])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_loss_of_rows_is_that_of_labels_however_they_are_laid_out(
    name: str, chunk_bytes: int, packed: bool, left: bool
) -> None:
    generator = np.random.default_rng(1)
    lengths = [6, 6, 6] if packed else [3, 6, 4]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    marks = np.ones(offsets[-1], dtype=np.uint8)
    marks[offsets[:-1]] = 0
    tokens = generator.integers(4, 12, offsets[-1]).astype(np.int32)
    counts = np.asarray(lengths) - 1
    rows = Rows(tokens, offsets, counts, None, pad_id=2, pad_left=left, marks=marks)
    batch = rows.batch(np.arange(3))
    labels = batch.pop("labels")
    model = case_of(name).model
    if left:  # as generation counts them
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        ours = token_loss(model, batch, labels, chunk_bytes=chunk_bytes)
        theirs = model(**batch, labels=labels).loss
        alone = [
            model(input_ids=torch.from_numpy(tokens[a:b].astype(np.int64))[None]).logits[0]
            for a, b in itertools.pairwise(offsets)
        ]
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    parts = [torch.from_numpy(tokens[a + 1 : b].astype(np.int64))
             for a, b in itertools.pairwise(offsets)]  # fmt: skip
    by_row = torch.nn.functional.cross_entropy(
        torch.cat([logits[:-1] for logits in alone]), torch.cat(parts)
    )
    assert ours.item() == pytest.approx(by_row.item(), rel=1e-5)
