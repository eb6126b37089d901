"""An evaluation keeps all cores busy, and its outputs do not depend on how many there are."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from architectures import backbone, moved_pet
from torch import Tensor, nn

from fedpet.data import Rows
from fedpet.training.evaluation import predict

CORES = 3


@pytest.fixture
def many_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(CORES)
    yield
    assert torch.get_num_threads() == CORES, "an evaluation leaves torch's threads as they were"
    torch.set_num_threads(before)


def _rows(collator: Any = None) -> Rows:
    generator = np.random.default_rng(0)
    lengths = generator.integers(3, 12, size=90)
    tokens = generator.integers(5, 60, size=lengths.sum()).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    labels = generator.integers(0, 2, size=90)
    return Rows(tokens, offsets, labels, None, pad_id=0, collator=collator)


@pytest.mark.parametrize("name", ["bert", "mpnet", "llama", "t5"])
def test_outputs_are_the_same_to_the_bit_on_one_core_and_on_several(
    name: str, many_cores: None
) -> None:
    kinds = "lora+lnfit" if name in ("llama", "t5") else "lora+lnfit+bitfit"
    model, rows = moved_pet(backbone(name), kinds, 0.1).model, _rows()
    if name == "t5":
        rows.tokens[rows.offsets[1:] - 1] = 1  # its head reads the last end-of-sequence token
    seen: set[int] = set()
    handle = model.register_forward_pre_hook(lambda *_: seen.add(threading.get_ident()))
    several = predict(model, rows, batch_size=4)
    handle.remove()
    torch.set_num_threads(1)
    alone = predict(model, rows, batch_size=4)
    torch.set_num_threads(CORES)
    assert len(seen) > 2
    np.testing.assert_array_equal(several, alone)


def test_a_model_of_ones_own_which_may_keep_state_is_called_by_one_thread(many_cores: None) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(60, 2)
            self.threads: set[int] = set()

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            self.threads.add(threading.get_ident())
            return type("Out", (), {"logits": self.embedding(input_ids).sum(1)})

    model = Counting()
    predict(model, _rows(), batch_size=4)
    assert model.threads == {threading.get_ident()}


def test_a_collator_of_ones_own_which_may_keep_state_is_called_by_one_thread_at_a_time(
    many_cores: None,
) -> None:
    busy: list[bool] = []
    at_once: list[int] = []

    def collator(features: list[dict[str, Any]]) -> dict[str, Tensor]:
        busy.append(True)
        at_once.append(len(busy))
        longest = max(len(row["input_ids"]) for row in features)
        ids = [row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in features]
        masks = [[int(token > 0) for token in row] for row in ids]
        busy.pop()
        labels = torch.tensor([row["labels"] for row in features])
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(masks)}
        return {**inputs, "labels": labels}

    model = backbone("bert").model
    found = predict(model, _rows(collator), batch_size=4)
    assert {*at_once} == {1}
    np.testing.assert_allclose(found, predict(model, _rows(), batch_size=4), rtol=1e-5, atol=1e-6)
