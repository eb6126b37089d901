"""A language model's loss by chunks: equal to transformers' own, of fewer logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from language_models import MODELS, model_of
from torch import Tensor

from fedpet.data.rows import NO_LABEL
from fedpet.training.token_loss import CHUNK_BYTES, row_sums, token_loss

ROWS, TOKENS, PAD = 3, 11, 2  # the padding is the end token, which is a label too
ONE_AT_A_TIME = 1  # bytes, of which even one position's logits have more


def a_batch(left: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Rows of unlike lengths, of which some tokens are labels; the last of each is the end."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(4, 20, (ROWS, TOKENS), generator=generator)
    attention, labels = torch.ones_like(ids), torch.full_like(ids, NO_LABEL)
    for row, length in enumerate((TOKENS, 7, 4)):
        first = TOKENS - length if left else 0
        inside = slice(first, first + length)
        ids[row, first + length - 1] = PAD
        outside = torch.ones(TOKENS, dtype=torch.bool)
        outside[inside] = False
        ids[row, outside], attention[row, outside] = PAD, 0
        labels[row, first + 2 : first + length] = ids[row, first + 2 : first + length]
    return {"input_ids": ids, "attention_mask": attention}, labels


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@contextmanager
def rows_seen(head: torch.nn.Module) -> Iterator[list[int]]:
    """Count the positions of each call of an output layer."""
    seen: list[int] = []
    with head.register_forward_hook(lambda _, args, out: seen.append(out[..., 0].numel())):
        yield seen


@pytest.mark.parametrize("left", [False, True], ids=["padded right", "padded left"])
@pytest.mark.parametrize("chunk_bytes", [CHUNK_BYTES, 300, ONE_AT_A_TIME])
@pytest.mark.parametrize("name", MODELS)
def test_the_loss_and_its_gradients_are_those_of_transformers_labels(
    name: str, chunk_bytes: int, left: bool
) -> None:
    model, (inputs, labels) = model_of(name), a_batch(left)
    model.get_output_embeddings().requires_grad_(False)  # as under a mask
    theirs = model(**inputs, labels=labels).loss
    expected = gradients(model, theirs)
    ours = token_loss(model, inputs, labels, chunk_bytes=chunk_bytes)
    found = gradients(model, ours)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_an_output_layer_that_is_trained_has_transformers_gradient(name: str) -> None:
    model, (inputs, labels) = model_of(name), a_batch(left=False)
    expected = gradients(model, model(**inputs, labels=labels).loss)
    found = gradients(model, token_loss(model, inputs, labels, chunk_bytes=300))
    head = "lm_head.weight" if name == "llama" else "model.embed_tokens.weight"
    assert head in found
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-6)


def test_the_output_layer_reads_whole_rows_since_others_cost_a_copy_of_its_weight_each() -> None:
    model, (inputs, labels) = model_of("llama"), a_batch(left=False)
    whole: list[bool] = []
    head = model.get_output_embeddings()
    with head.register_forward_hook(lambda _, args, out: whole.append(args[0].is_contiguous())):
        token_loss(model, inputs, labels)
        row_sums(model, inputs, labels)
    assert len(whole) > 2
    assert all(whole)


def test_positions_without_a_label_never_reach_the_output_layer() -> None:
    model, (inputs, labels) = model_of("llama"), a_batch(left=False)
    model.requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_(True)
    wanted = int((labels[:, 1:] != NO_LABEL).sum())
    token_loss(model, inputs, labels)  # tries the layer once
    with rows_seen(model.lm_head) as seen:
        token_loss(model, inputs, labels, chunk_bytes=4 * 20 * 5).backward()
    assert seen[0] == ROWS  # one position a row, in the model's own call
    assert sum(seen[1:]) == wanted  # and no product is done again
    assert max(seen[1:]) == 5


def test_a_model_that_caps_its_logits_has_transformers_loss() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, vocab_size=20, head_dim=8, final_logit_softcapping=0.05,
    )  # fmt: skip
    model, (inputs, labels) = Gemma2ForCausalLM(config).eval(), a_batch(left=False)
    theirs = model(**inputs, labels=labels).loss
    for _ in range(2):  # before and after it is known
        ours = token_loss(model, inputs, labels, chunk_bytes=300)
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


@pytest.mark.parametrize("chunk_bytes", [CHUNK_BYTES, 300])
def test_sums_by_row_are_those_of_each_row_alone(chunk_bytes: int) -> None:
    model, (inputs, labels) = model_of("gpt2"), a_batch(left=False)
    sums = row_sums(model, inputs, labels, chunk_bytes=chunk_bytes)
    logits = model(**inputs).logits[:, :-1]
    for row in range(ROWS):
        chosen = labels[row, 1:] != NO_LABEL
        targets = labels[row, 1:][chosen]
        losses = torch.nn.functional.cross_entropy(logits[row][chosen], targets, reduction="sum")
        hits = (logits[row][chosen].argmax(-1) == targets).sum()
        assert sums[row].tolist() == pytest.approx([losses.item(), hits.item()], rel=1e-5)
    whole = token_loss(model, inputs, labels)
    count = int((labels[:, 1:] != NO_LABEL).sum())
    assert float(sums[:, 0].sum()) / count == pytest.approx(whole.item(), rel=1e-5)


def test_a_batch_without_a_label_has_the_loss_0_and_a_gradient() -> None:
    model, (inputs, labels) = model_of("llama"), a_batch(left=False)
    loss = token_loss(model, inputs, torch.full_like(labels, NO_LABEL))
    loss.backward()
    assert loss.item() == 0.0


def test_threads_that_run_a_model_at_the_same_time_take_each_its_own_states() -> None:
    from concurrent.futures import ThreadPoolExecutor

    model, (inputs, labels) = model_of("llama"), a_batch(left=False)
    batches = [({k: v[rows] for k, v in inputs.items()}, labels[rows]) for rows in ([0], [1, 2])]
    alone = [row_sums(model, *batch) for batch in batches]
    with ThreadPoolExecutor(2) as pool:
        found = [*pool.map(lambda number: row_sums(model, *batches[number % 2]), range(40))]
    for number, sums in enumerate(found):
        torch.testing.assert_close(sums, alone[number % 2])
