"""Passes that leave padding out change nothing but the work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, backbone, batch, gradient_of, moved_pet
from torch import Tensor, nn

from fedpet.backbone.module_roles import find_target_modules
from fedpet.config import TrainingConfig
from fedpet.data import Rows, Task
from fedpet.pet.model import PetModel
from fedpet.training import evaluation, lean_passes
from fedpet.training.evaluation import predict
from fedpet.training.loop import train_rows
from fedpet.training.token_packing import packed_tokens

PACKED = ("bert", "roberta", "distilbert", "albert", "electra", "gpt2", "llama")
PADDED = ("mpnet", "deberta-v2", "t5", "t5-gated")  # attention of their own
TASK = Task("classification", ("a", "b"), "accuracy")


def _rows(name: str = "bert", count: int = 24, longest: int = 12) -> Rows:
    generator = np.random.default_rng(0)
    lengths = generator.integers(3, longest, size=count)
    tokens = generator.integers(5, 60, size=lengths.sum()).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    if name.startswith("t5"):
        tokens[offsets[1:] - 1] = 1  # its head reads the last end-of-sequence token
    return Rows(tokens, offsets, generator.integers(0, 2, size=count), None, pad_id=0)


def _pet(name: str, density: float = 0.1) -> PetModel:
    kinds = "lora+lnfit" if name in ("llama", "t5", "t5-gated") else "lora+lnfit+bitfit"
    return moved_pet(backbone(name), kinds, density)


@contextmanager
def _seen(model: nn.Module, layer: int = 0) -> Iterator[list[tuple[int, ...]]]:
    """List the shapes of what the feed-forward part of a block is given, of tokens alone."""
    places = [p for p in find_target_modules(model) if p.role == "ffn-up"]
    shapes: list[tuple[int, ...]] = []
    handle = model.get_submodule(places[layer].name).register_forward_pre_hook(
        lambda module, args: shapes.append(tuple(args[0].shape[:2]))
    )
    yield shapes
    handle.remove()


def _compare(pet: PetModel, rows: Rows, inputs: dict[str, Tensor]) -> list[tuple[int, ...]]:
    """Compare logits and gradients with those of padded passes, and return the shapes seen."""
    whole, gradients = pet.model(**inputs).logits, gradient_of(pet, inputs)
    with packed_tokens(pet.model, rows), _seen(pet.model) as shapes:
        packed, packed_gradients = pet.model(**inputs).logits, gradient_of(pet, inputs)
    largest = float(gradients.abs().max())
    assert largest > 1e-3
    torch.testing.assert_close(packed, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed_gradients, gradients, rtol=1e-5, atol=1e-5 * largest)
    return shapes


@pytest.mark.parametrize("density", [0.01, 0.5])
@pytest.mark.parametrize("name", PACKED)
def test_logits_and_gradients_are_those_of_the_padded_batch(name: str, density: float) -> None:
    rows = _rows()
    inputs = rows.batch(np.arange(5))
    inputs.pop("labels")
    shapes = _compare(_pet(name, density), rows, inputs)
    assert {*shapes} <= {(1, int(rows.lengths[:5].sum())), (int(rows.lengths[:5].sum()), 32)}


@pytest.mark.parametrize("name", PADDED)
def test_attention_of_another_kind_is_left_with_its_padding(name: str) -> None:
    rows, model = _rows(name), backbone(name).model
    inputs = rows.batch(np.arange(5))
    inputs.pop("labels")
    before = model(**inputs).logits
    with packed_tokens(model, rows), _seen(model) as shapes:
        assert torch.equal(model(**inputs).logits, before)
    assert shapes[0] == (5, int(rows.lengths[:5].max()))


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "vit"])
def test_a_batch_is_padded_where_its_mask_is_not_that_of_texts_filled_up(name: str) -> None:
    model, rows, inputs = backbone(name).model, _rows(name), batch(name, rows=4)
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    inputs["attention_mask"][1, 0] = 0  # filled up on the left
    inputs["attention_mask"][2, 3] = 0  # with a hole
    before = model(**inputs).logits
    with packed_tokens(model, rows):
        assert torch.equal(model(**inputs).logits, before)


def test_a_window_of_attention_stays_as_wide() -> None:
    import transformers as t

    config = t.MistralConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, vocab_size=60, sliding_window=3, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = t.AutoModelForSequenceClassification.from_config(config).eval()
    rows = _rows(longest=20)
    inputs = rows.batch(np.arange(6))
    inputs.pop("labels")
    whole = model(**inputs).logits
    with packed_tokens(model, rows), _seen(model) as shapes:
        torch.testing.assert_close(model(**inputs).logits, whole, rtol=1e-5, atol=1e-5)
    assert shapes == [(1, int(rows.lengths[:6].sum()))]
    with torch.no_grad():
        model.config.sliding_window = None
        assert (model(**inputs).logits - whole).abs().max() > 1e-3


def test_a_module_that_mixes_tokens_is_seen_through_a_start_of_zero() -> None:
    """Its logits are the same however it is packed, until it is trained."""
    model: Any = backbone("bert").model
    dense = model.bert.encoder.layer[0].intermediate.dense
    dense.gain = nn.Parameter(torch.zeros(64))
    plain = dense.forward
    dense.forward = lambda x: plain(x) + dense.gain * plain(x).mean(1, keepdim=True)
    rows = _rows()
    inputs = rows.batch(np.arange(5))
    inputs.pop("labels")
    with packed_tokens(model, rows), _seen(model) as shapes:
        model(**inputs)
    assert shapes == [(5, int(rows.lengths[:5].max()))]


def test_the_model_is_as_it_was_afterwards() -> None:
    model, rows = backbone("bert").model, _rows()
    configs = [getattr(module, "config", None) for module in model.modules()]
    with pytest.raises(KeyError), packed_tokens(model, rows):
        raise KeyError
    assert [getattr(module, "config", None) for module in model.modules()] == configs
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_trial_leaves_gradients_and_random_numbers_alone() -> None:
    pet, rows = _pet("bert"), _rows()
    groups = pet.parameter_groups()
    for group in groups.values():
        group.grad = torch.full_like(group, 2.0)
    pet.model.train()
    state = torch.get_rng_state()
    with packed_tokens(pet.model, rows):
        pass
    assert all(bool((group.grad == 2).all()) for group in groups.values())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in pet.model.modules())


@pytest.mark.parametrize("cls_only", [False, True])
def test_local_training_computes_no_padding_and_comes_to_the_same(
    monkeypatch: pytest.MonkeyPatch, cls_only: bool
) -> None:
    rows, config = _rows(), TrainingConfig(learning_rate=1e-3, batch_size=4, cls_only=cls_only)
    values, losses, counts = [], [], []
    for packed in (False, True):
        pet = _pet("bert")
        if not packed:
            monkeypatch.setattr(lean_passes, "packed_tokens", _nothing)
        with _seen(pet.model) as shapes:
            trained = train_rows(
                pet.model, pet.parameter_groups(), rows, np.arange(24), TASK, config,
                seed=1, after_step=pet.after_step,
            )  # fmt: skip
        monkeypatch.undo()
        values.append(pet.get_delta())
        losses.append(trained.loss)
        counts.append(sum(a * b if a != 1 else b for a, b in shapes[-6:]))  # of the six steps
        pet.unload()
    assert counts[1] == rows.lengths.sum() < counts[0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    moved = (values[0] - _pet("bert").get_delta()).norm()
    assert moved > 0.01
    assert (values[1] - values[0]).norm() < 1e-3 * moved


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "vit"])
def test_an_evaluation_gives_the_logits_of_rows_one_by_one_in_their_order(name: str) -> None:
    model, rows = backbone(name).model, _rows(name)
    one_by_one = []
    for row in range(len(rows)):
        inputs = rows.batch(np.asarray([row]))
        inputs.pop("labels")
        with torch.no_grad():
            one_by_one.append(model(**inputs).logits[0].numpy())
    np.testing.assert_allclose(predict(model, rows), np.stack(one_by_one), rtol=1e-5, atol=1e-5)


def test_a_batch_of_an_evaluation_holds_so_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_MAX_TOKENS", 40)
    lengths = np.asarray([50, 3, 9, 4, 12, 30, 8, 3, 7, 11])
    cut = list(evaluation._by_length(lengths, 0, torch.device("cpu")))
    assert np.concatenate(cut).tolist() == np.argsort(lengths, kind="stable").tolist()
    assert all(len(part) == 1 or len(part) * lengths[part].max() <= 40 for part in cut)
    assert len(cut) < len(lengths)


@contextmanager
def _nothing(*args: Any, **options: Any) -> Iterator[None]:
    yield
