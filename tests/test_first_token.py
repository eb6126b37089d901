"""Passes that compute the last feed-forward part at the first token only change nothing else."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, backbone, batch, loss_of, mask_of, structure_of
from torch import Tensor, nn

from fedpet.config import TrainingConfig
from fedpet.data import Rows, Task
from fedpet.errors import ConfigError
from fedpet.first_token import check_first_token, first_token_only
from fedpet.model import PetModel
from fedpet.positions import find_positions
from fedpet.training import train_rows

CUT = ("bert", "roberta", "distilbert", "mpnet", "deberta-v2", "electra")
BY_SDPA = ("bert", "roberta", "distilbert", "electra")  # the others compute attention themselves
WHOLE = tuple(name for name in ARCHITECTURES if name not in CUT)


def _last(model: nn.Module, role: str) -> nn.Module:
    """The last block's Linear of this role."""
    places = [p for p in find_positions(model) if p.role == role]
    return model.get_submodule(places[-1].name)


def _pet(name: str) -> PetModel:
    base = backbone(name)
    return PetModel(base, mask_of(base), structure_of(base, "lora+lnfit+bitfit"), seed=3)


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
def test_the_last_query_is_the_first_tokens_where_sdpa_attends(name: str) -> None:
    pet, inputs = _pet(name), batch(name, rows=4)
    seen: list[int] = []
    handle = _last(pet.model, "query").register_forward_hook(
        lambda module, args, output: seen.append(args[0].shape[1])
    )
    with first_token_only(pet.model, inputs):
        seen.clear()
        pet.model(**inputs)
    handle.remove()
    assert (seen[0] == 1) == (name in BY_SDPA)


def test_the_last_attention_is_of_one_query(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = backbone("bert").model, batch("bert", rows=4)
    plain, seen = nn.functional.scaled_dot_product_attention, []

    def attend(query: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append(query.shape[2])
        return plain(query, *args, **options)

    with first_token_only(model, inputs):
        monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attend)
        model(**inputs)
    assert seen[-1] == 1 < min(seen[:-1])


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


@pytest.mark.parametrize("name", WHOLE)
def test_a_model_that_cannot_be_cut_is_refused_in_a_sentence(name: str) -> None:
    model = backbone(name).model
    with pytest.raises(ConfigError, match=f"first-token-only .* {type(model).__name__} is no such"):
        check_first_token(model, batch(name))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_classifier_that_reads_other_tokens_is_seen_through_weights_of_zero() -> None:
    """Its logits would be the same however it was cut, until it is trained."""
    first: Any = copy.deepcopy(backbone("bert").model)
    first.classifier.weight.data.zero_()
    mean = copy.deepcopy(first)
    mean.bert.pooler.forward = lambda hidden: hidden.mean(1)
    check_first_token(first, batch("bert"))
    with pytest.raises(ConfigError, match="first-token-only"):
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
        config = TrainingConfig(batch_size=4, first_token_only=cut)
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
        values.append(pet.values())
        losses.append(trained.loss)
        widths.append(max(seen[-6:]))  # of the six steps
        pet.restore()
    assert widths[1] == 1 < widths[0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    moved = (values[0] - _pet("bert").values()).norm()
    assert moved > 0.01
    assert (values[1] - values[0]).norm() < 1e-3 * moved
