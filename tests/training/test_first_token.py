"""Passes that compute of the last block what the first token needs change nothing else."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, backbone, batch, loss_of, mask_of, structure_of
from torch import Tensor, nn

from fedpet.backbone.module_roles import find_target_modules
from fedpet.config import TrainingConfig
from fedpet.data import Rows, Task
from fedpet.errors import ConfigError
from fedpet.pet.model import PetModel
from fedpet.training.cls_only import check_first_token, first_token_only
from fedpet.training.loop import train_rows

CUT = ("bert", "roberta", "distilbert", "mpnet", "deberta-v2", "electra")
APART = ("bert", "roberta", "distilbert", "mpnet", "electra")  # DeBERTa's attention stays whole
WHOLE = tuple(name for name in ARCHITECTURES if name not in CUT)


def _last(model: nn.Module, role: str) -> nn.Module:
    """The last block's Linear of this role."""
    places = [p for p in find_target_modules(model) if p.role == role]
    return model.get_submodule(places[-1].name)


def _pet(name: str, structure: str = "lora+lnfit+bitfit", density: float = 0.1) -> PetModel:
    base = backbone(name)
    return PetModel(base, mask_of(base, density), structure_of(base, structure), seed=3)


def _moved(pet: PetModel) -> PetModel:
    """Off zero, where what is not trained yet does nothing."""
    generator = torch.Generator().manual_seed(1)
    pet.set_delta(0.05 * torch.randn(pet.num_values, generator=generator), seed=0)
    return pet


def _last_attention(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module, inputs: Any
) -> tuple[Tensor, Tensor]:
    """The keys and values that the last attention is given."""
    plain, seen = nn.functional.scaled_dot_product_attention, []

    def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        seen.append((key, value))
        return plain(query, key, value, **options)

    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "scaled_dot_product_attention", attend)
        model(**inputs)
    return seen[-1]


def _gradients(pet: PetModel, inputs: dict[str, Tensor]) -> Tensor:
    pet.zero_grad()
    loss_of(pet.model, inputs).backward()
    return torch.cat([group.grad.flatten().clone() for group in pet.parameter_groups().values()])


@pytest.mark.parametrize("name", CUT)
def test_logits_and_gradients_are_those_of_whole_passes(name: str) -> None:
    pet, inputs = _pet(name), batch(name, rows=4)
    whole, gradients = pet.model(**inputs).logits, _gradients(pet, inputs)
    seen: list[tuple[int, ...]] = []
    handle = _last(pet.model, "ffn-up").register_forward_pre_hook(
        lambda module, args: seen.append(tuple(args[0].shape[:2]))
    )
    with first_token_only(pet.model, inputs):
        seen.clear()
        cut, cut_gradients = pet.model(**inputs).logits, _gradients(pet, inputs)
    handle.remove()
    assert set(seen) == {(4, 1)}
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cut_gradients, gradients, rtol=1e-4, atol=1e-6)
    assert cut_gradients.abs().max() > 1e-3


@pytest.mark.parametrize("name", CUT)
def test_the_last_query_is_the_first_tokens_alone(name: str) -> None:
    pet, inputs = _pet(name), batch(name, rows=4)
    seen: list[int] = []
    handle = _last(pet.model, "query").register_forward_hook(
        lambda module, args, output: seen.append(args[0].shape[1])
    )
    with first_token_only(pet.model, inputs):
        seen.clear()
        pet.model(**inputs)
    handle.remove()
    assert (seen[0] == 1) == (name in APART)


@pytest.mark.parametrize("name", APART)
@pytest.mark.parametrize("structure", ["none", "lora+bitfit", "lora-factors+hiwi-bias"])
def test_the_last_attention_is_over_tokens_that_have_no_keys(
    name: str, structure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pet, inputs = _moved(_pet(name, structure)), batch(name, rows=4)
    whole, gradients = pet.model(**inputs).logits, _gradients(pet, inputs)
    with first_token_only(pet.model, inputs):
        keys, values = _last_attention(monkeypatch, pet.model, inputs)
        cut, cut_gradients = pet.model(**inputs).logits, _gradients(pet, inputs)
    assert keys.shape == (4, 1, 9, 32)  # rows, one for all heads, tokens, hidden size
    assert values is keys  # two views would add gradients up in another order: other last bits
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        cut_gradients, gradients, rtol=1e-4, atol=1e-5 * float(gradients.abs().max())
    )


@pytest.mark.parametrize("density", [0.01, 0.5])
def test_few_and_many_entries_of_keys_and_values(density: float) -> None:
    """Many are taken from dense products of a few rows at a time."""
    pet, inputs = _moved(_pet("bert", "none", density)), batch("bert", rows=4)
    gradients = _gradients(pet, inputs)
    with first_token_only(pet.model, inputs):
        cut = _gradients(pet, inputs)
    torch.testing.assert_close(cut, gradients, rtol=1e-4, atol=1e-5 * float(gradients.abs().max()))


def test_gates_meet_keys_and_values_as_in_whole_passes() -> None:
    pet, inputs = _moved(_pet("bert")), batch("bert", rows=4)
    gates = torch.linspace(0.1, 1, len(pet._structure)).requires_grad_(True)

    def of_gates() -> Tensor:
        pet.set_gates(gates)
        (gradient,) = torch.autograd.grad(loss_of(pet.model, inputs), gates)
        return gradient

    whole = of_gates()
    with first_token_only(pet.model, inputs):
        torch.testing.assert_close(of_gates(), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", APART)
def test_where_attention_may_drop_weights_keys_are_made(name: str) -> None:
    pet, inputs = _moved(_pet(name, "none")), batch(name, rows=4)
    whole, gradients = pet.model(**inputs).logits, _gradients(pet, inputs)
    for module in pet.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    pet.model.train()
    keys: list[Tensor] = []
    handle = _last(pet.model, "key").register_forward_hook(
        lambda module, args, output: keys.append(output.detach())
    )
    with first_token_only(pet.model, inputs):
        keys.clear()
        cut, cut_gradients = pet.model(**inputs).logits, _gradients(pet, inputs)
    handle.remove()
    assert [key.shape for key in keys] == 2 * [(4, 9, 32)]
    assert all(key.abs().max() > 0 for key in keys)  # not what stands for them
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cut_gradients, gradients, rtol=1e-4, atol=1e-5)


def test_in_half_precision_keys_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = backbone("bert").model, batch("bert", rows=4)
    with torch.autocast("cpu", torch.bfloat16), first_token_only(model, inputs):
        keys, _ = _last_attention(monkeypatch, model, inputs)
    assert keys.shape == (4, 4, 9, 8)


@pytest.mark.parametrize("name", CUT)
def test_the_model_is_as_it_was_afterwards(name: str) -> None:
    model, inputs = backbone(name).model, batch(name)
    model.train()
    with first_token_only(model, inputs):
        assert all(module.training for module in model.modules())
    model.eval()
    before = model(**inputs).logits
    with pytest.raises(KeyError), first_token_only(model, inputs):
        raise KeyError
    assert torch.equal(model(**inputs).logits, before)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert not any("forward" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("name", WHOLE)
def test_a_model_that_cannot_be_cut_is_refused_in_a_sentence(name: str) -> None:
    model = backbone(name).model
    with pytest.raises(ConfigError, match=f"cls-only .* {type(model).__name__} is no such"):
        check_first_token(model, batch(name))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_classifier_that_reads_other_tokens_is_seen_through_weights_of_zero() -> None:
    """Its logits would be the same however it was cut, until it is trained."""
    first: Any = copy.deepcopy(backbone("bert").model)
    first.classifier.weight.data.zero_()
    mean = copy.deepcopy(first)
    mean.bert.pooler.forward = lambda hidden: hidden.mean(1)
    check_first_token(first, batch("bert"))
    with pytest.raises(ConfigError, match="cls-only"):
        check_first_token(mean, batch("bert"))


def test_local_training_is_the_same_up_to_rounding() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(3, 12, size=24)
    rows = Rows(
        tokens=generator.integers(5, 60, size=lengths.sum()).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        labels=generator.integers(0, 2, size=24),
        types=None,
        pad_id=0,
    )
    task = Task("classification", ("a", "b"), "accuracy")
    values, losses, widths = [], [], []
    for cut in (False, True):
        config = TrainingConfig(learning_rate=1e-3, batch_size=4, cls_only=cut)
        pet = _pet("bert")
        seen: list[int] = []
        handle = _last(pet.model, "ffn-up").register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(args[0].shape[1])
        )
        trained = train_rows(
            pet.model, pet.parameter_groups(), rows, np.arange(24), task, config,
            seed=1, after_step=pet.after_step,
        )  # fmt: skip
        handle.remove()
        values.append(pet.get_delta())
        losses.append(trained.loss)
        widths.append(max(seen[-6:]))  # of the six steps
        pet.unload()
    assert widths[1] == 1 < widths[0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    moved = (values[0] - _pet("bert").get_delta()).norm()
    assert moved > 0.01
    assert (values[1] - values[0]).norm() < 1e-3 * moved
