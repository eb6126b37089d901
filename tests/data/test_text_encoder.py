"""Texts become the tokens that the tokeniser gives when it is called, word by word or whole."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from fedpet.backbone.pretrained import locate
from fedpet.config import BackboneConfig
from fedpet.data import word_tokens
from fedpet.data.text_encoder import Encoded, TextEncoder
from fedpet.data.tokenize import load_tokenizer
from fedpet.data.word_tokens import WordTokens, gather

CORPUS = ["a film isn't bad", "it's the film's 2nd  half", "they'll go, won't they?", "x = 12/3"]
PIECES = [
    "film", "isn't", "'s", "A", "don't!", "12", " ", "  ", "\t", "\n", "[SEP]", "[sep]", "<e1>",
    "Café", "e\u0301", "日本", "\x00", "\x7f", "\x1c", "a" * 120, "x y", "#", "##ing", "_", "🙂",
]  # fmt: skip


@cache
def tokenizer(name: str) -> Any:
    if name == "wordpiece":
        return load_tokenizer(locate(BackboneConfig()))
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=name == "prefixed")
    byte_level.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    byte_level.train_from_iterator(
        CORPUS,
        BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet),
    )
    if name == "ends":
        byte_level.post_processor = TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>",
            special_tokens=[("<s>", 0), ("</s>", 1)],
        )  # fmt: skip
    made = PreTrainedTokenizerFast(tokenizer_object=byte_level, eos_token="</s>", pad_token="</s>")
    made.add_tokens([AddedToken("<e1>")])
    return made


def called(of: Any, columns: list[list[str]], max_length: int) -> Encoded:
    """Return the tokens of the tokeniser itself, called on the texts."""
    found = of(*columns, truncation=True, max_length=max_length, return_attention_mask=False)
    return Encoded.of(found["input_ids"], found.get("token_type_ids"))


def assert_same(ours: Encoded, theirs: Encoded) -> None:
    for one, other in zip(
        (ours.ids, ours.counts, ours.types), (theirs.ids, theirs.counts, theirs.types), strict=True
    ):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)


texts = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=8)), max_size=8).map(
    lambda parts: " ".join(parts)
) | st.lists(st.sampled_from(PIECES), max_size=8).map("".join)


@pytest.mark.parametrize("name", ["wordpiece", "byte level", "ends", "prefixed"])
@settings(max_examples=60)
@given(rows=st.lists(texts, min_size=1, max_size=12), max_length=st.integers(3, 12))
@example(
    rows=["a film", " a film ", "a  film", "", " ", "a film [SEP] b", "Café film"], max_length=6
)
def test_every_text_gives_the_tokens_of_the_tokeniser_itself(
    name: str, rows: list[str], max_length: int
) -> None:
    theirs = called(tokenizer(name), [rows], max_length)
    for column in (rows, pa.array(rows), pa.array(rows, pa.large_string())):
        assert_same(TextEncoder(tokenizer(name), max_length).encode([column]), theirs)


@pytest.mark.parametrize(
    ("name", "by_words"),
    [("wordpiece", True), ("byte level", True), ("ends", True), ("prefixed", False)],
)
def test_plain_texts_are_cut_into_words_where_words_do(name: str, by_words: bool) -> None:
    made = tokenizer(name)
    made(["a"], truncation=True, max_length=8)
    words = WordTokens.of(made)
    assert (words is not None) == by_words
    if words is not None:
        texts = [
            "it isn't a film",
            "Café",
            "a [SEP]" if name == "wordpiece" else "a <e1>",
            "a\x00b",
        ]
        assert words.fits(pa.array(texts)).tolist() == [True, False, False, False]


@pytest.mark.parametrize("name", ["wordpiece", "ends"])
def test_words_are_looked_up_and_forgotten_without_a_change_of_tokens(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(word_tokens, "_MOST_WORDS", 5)
    monkeypatch.setattr(word_tokens, "_BATCH_WORDS", 2)
    encoder = TextEncoder(tokenizer(name), 8)
    for start in range(6):
        rows = [f"a film {i % 4} of {i}" for i in range(start, start + 7)]
        assert_same(encoder.encode([rows]), called(tokenizer(name), [rows], 8))


@pytest.mark.parametrize("name", ["wordpiece", "ends", "byte level"])
def test_pairs_give_the_tokens_of_the_tokeniser_itself(name: str) -> None:
    columns = [["a film", "x", "a b c d e f g"], ["it's bad", "1 2 3 4 5 6 7 8 9", "so"]]
    assert_same(
        TextEncoder(tokenizer(name), 9).encode(columns), called(tokenizer(name), columns, 9)
    )


def counted(of: Any, calls: list[int]) -> Any:
    """The tokeniser, which notes how many texts it is called with."""

    class Counting(type(of)):  # type: ignore[misc]
        def _encode_plus(self, *given: Any, **options: Any) -> Any:
            calls.append(len(given[0]) if given else len(options["text"]))
            return super()._encode_plus(*given, **options)

    made = copy.copy(of)
    made.__class__ = Counting
    return made


def test_a_tokeniser_that_encodes_in_a_way_of_its_own_is_called_for_all_texts() -> None:
    calls: list[int] = []
    rows = ["a film", "bad", "so it is"]
    ours = TextEncoder(counted(tokenizer("wordpiece"), calls), 8).encode([rows])
    assert calls == [1, 3]
    assert_same(ours, called(tokenizer("wordpiece"), [rows], 8))


@pytest.mark.parametrize(
    "change",
    [
        lambda backend: setattr(backend, "normalizer", normalizers.NFKC()),
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.Whitespace()),
        lambda backend: backend.enable_truncation(8, direction="left"),
        lambda backend: backend.enable_padding(length=8),
        lambda backend: backend.no_truncation(),
        lambda backend: backend.add_tokens([AddedToken("Film", normalized=True)]),
    ],
)
def test_words_do_for_no_tokeniser_that_looks_beyond_a_word(change: Any, tmp_path: Path) -> None:
    tokenizer("wordpiece").save_pretrained(tmp_path)
    made = load_tokenizer(tmp_path)
    made(["a"], truncation=True, max_length=8)
    assert WordTokens.of(made) is not None
    change(made.backend_tokenizer)
    assert WordTokens.of(made) is None


def test_parts_of_an_array_are_joined_in_the_order_asked_for() -> None:
    flat = np.arange(10) * 10
    starts, lengths = np.array([7, 0, 4, 4]), np.array([2, 3, 0, 1])
    assert gather(flat, starts, lengths).tolist() == [70, 80, 0, 10, 20, 40]
    assert gather(flat, starts[:0], lengths[:0]).tolist() == []
