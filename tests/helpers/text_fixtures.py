"""Files of rows for the tests of loading, and a tokeniser that knows every word in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedpet.config import ClientsConfig
from fedpet.data import Rows

WORDS = [f"w{i}" for i in range(40)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
TWO_OR_MORE = ClientsConfig(partition="iid", num_clients=4, min_rows=2)


def save_tokenizer(folder: Path, words: list[str], **special: str) -> Path:
    """A tokeniser of whole words that marks pairs as BERT does."""
    vocabulary = {word: i for i, word in enumerate(SPECIAL + words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **special,
    ).save_pretrained(folder)
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def some_rows(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of two classes and five owners, the same for the same seed."""
    rng = np.random.default_rng(seed)
    return [
        {
            "text": " ".join(rng.choice(WORDS, size=rng.integers(1, 12))) + f" w{i % 40}",
            "other": " ".join(rng.choice(WORDS, size=rng.integers(1, 12))),
            "label": ["no", "yes"][i % 2],
            "score": float(i) / 4,
            "owner": f"owner {i % 5}",
        }
        for i in range(n)
    ]


def two_splits(folder: Path) -> Path:
    """Write 40 rows to train on and 12 to evaluate on."""
    write(folder / "train.jsonl", some_rows(40))
    write(folder / "test.jsonl", some_rows(12, seed=1))
    return folder


def texts_of(rows: Rows, tokenizer_folder: Path) -> list[str]:
    """Return the texts of the loaded rows."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    return [
        tokenizer.decode(rows.tokens[a + 1 : b - 1])  # between [CLS] and [SEP]
        for a, b in zip(rows.offsets, rows.offsets[1:], strict=False)
    ]
