"""Rows: what a batch holds is what the rows hold."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpet.data import Rows

PAD_ID = 99

token_lists = st.lists(
    st.lists(st.integers(0, 98), min_size=1, max_size=9), min_size=1, max_size=12
)


def make_rows(texts: list[list[int]], *, types: bool = True, regression: bool = False) -> Rows:
    tokens = np.array([token for text in texts for token in text], dtype=np.int32)
    return Rows(
        tokens=tokens,
        offsets=np.cumsum([0, *map(len, texts)], dtype=np.int64),
        labels=np.arange(len(texts), dtype=np.float32 if regression else np.int64),
        types=(tokens % 2).astype(np.uint8) if types else None,
        pad_id=PAD_ID,
    )


@given(texts=token_lists, data=st.data())
def test_a_batch_gives_back_the_tokens_of_its_rows_in_the_order_asked_for(
    texts: list[list[int]], data: st.DataObject
) -> None:
    rows = make_rows(texts)
    chosen = data.draw(st.lists(st.integers(0, len(texts) - 1), min_size=1, max_size=20))
    batch = rows.batch(np.array(chosen))
    for place, row in enumerate(chosen):
        inside = batch["attention_mask"][place].bool()
        assert batch["input_ids"][place][inside].tolist() == texts[row]
        assert batch["token_type_ids"][place][inside].tolist() == [t % 2 for t in texts[row]]
        assert batch["labels"][place] == row


@given(texts=token_lists)
def test_a_batch_is_as_wide_as_its_longest_row_and_padded_on_the_right(
    texts: list[list[int]],
) -> None:
    rows = make_rows(texts)
    batch = rows.batch(np.arange(len(texts)))
    longest = max(map(len, texts))
    assert batch["input_ids"].shape == (len(texts), longest)
    for row, text in enumerate(texts):
        assert batch["attention_mask"][row].tolist() == [1] * len(text) + [0] * (
            longest - len(text)
        )
        assert (batch["input_ids"][row, len(text) :] == PAD_ID).all()
        assert (batch["token_type_ids"][row, len(text) :] == 0).all()


def test_a_short_batch_is_not_padded_to_the_longest_row_of_the_data() -> None:
    rows = make_rows([[1] * 50, [2, 3], [4]])
    assert rows.batch(np.array([1, 2]))["input_ids"].tolist() == [[2, 3], [4, PAD_ID]]


def test_tensors_have_the_types_a_model_takes() -> None:
    batch = make_rows([[1, 2]]).batch(np.array([0]))
    assert {name: tensor.dtype for name, tensor in batch.items()} == {
        "input_ids": torch.int64,
        "attention_mask": torch.int64,
        "token_type_ids": torch.int64,
        "labels": torch.int64,
    }
    regression = make_rows([[1, 2]], types=False, regression=True).batch(np.array([0]))
    assert regression["labels"].dtype == torch.float32
    assert "token_type_ids" not in regression


def test_lengths_count_the_tokens_of_each_row() -> None:
    rows = make_rows([[1, 2], [3], [4, 5, 6]])
    assert len(rows) == 3
    assert rows.lengths.tolist() == [2, 1, 3]
    assert rows.lengths.dtype == np.int32


def test_writing_into_a_batch_leaves_the_rows_alone() -> None:
    rows = make_rows([[1, 2], [3, 4]])
    for tensor in rows.batch(np.array([0, 1])).values():
        tensor.fill_(7)
    assert rows.batch(np.array([1]))["input_ids"].tolist() == [[3, 4]]
    assert rows.labels.tolist() == [0, 1]
