"""Texts into token ids, by the backbone's own tokeniser.

In:  texts, or pairs of texts, and the tokeniser's folder.
Out: the arrays of `Rows`.

A text is a string with something other than blanks in it; a row without one is refused, not
skipped. Rows are cut at `max_length` tokens, special ones counted, the longer text of a pair first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from fedpet.errors import ConfigError, DataError

_VOCABULARY = ("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model")
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")
_BATCH_ROWS = 2048


def hash_tokenizer(folder: Path) -> str:
    """SHA-256, 64 hex digits, of tokenizer.json, or of the older vocabulary files in its place.

    Raises:
        DataError: The folder holds no tokeniser.
    """
    if (folder / "tokenizer.json").is_file():
        return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    if not any((folder / name).is_file() for name in _VOCABULARY):
        raise DataError(
            f"{str(folder)!r} holds no tokeniser: neither tokenizer.json nor "
            f"{', '.join(_VOCABULARY)}. Take a checkpoint that comes with its tokeniser."
        )
    return _hash_files(folder, (*_VOCABULARY, *_SETTINGS))


def hash_tokenizer_files(folder: Path) -> str:
    """SHA-256 of all that may decide a token: what the cache goes by, stricter than the plan."""
    return _hash_files(folder, ("tokenizer.json", *_VOCABULARY, *_SETTINGS))


def _hash_files(folder: Path, names: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        if (folder / name).is_file():
            digest.update(name.encode() + hashlib.sha256((folder / name).read_bytes()).digest())
    return digest.hexdigest()


def check_texts(texts: Sequence[Any], column: str, where: str) -> None:
    """Refuse the first entry that is no text.

    Raises:
        DataError: With the row, the column and what stands there.
    """
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(
                f"row {row + 1} of {where} has {text!r} in column {column!r}, where a text should "
                "be: mend or remove the row, or check data.text-columns."
            )
        if not text.strip():
            raise DataError(
                f"row {row + 1} of {where} has an empty text in column {column!r}. A row without "
                "text teaches nothing: remove it."
            )


def tokenise(
    texts: Sequence[Sequence[str]], folder: Path, max_length: int, where: str
) -> tuple[dict[str, np.ndarray], int]:
    """Tokenise all rows.

    Args:
        texts: One sequence of n texts, or two for pairs.
        folder: The tokeniser's folder.
        max_length: Tokens a row, special ones counted.
        where: The split, for messages.

    Returns:
        `tokens` int32 (num_tokens,), `offsets` int64 (n + 1,), and `types` uint8 (num_tokens,)
        where the tokeniser makes token type ids; and the token id to fill rows up with.

    Raises:
        ConfigError: `max_length` is more than the tokeniser's model takes.
        DataError: The tokeniser cannot be loaded, or makes no token of a text.
    """
    tokenizer = _load_tokenizer(folder)
    if max_length > tokenizer.model_max_length:
        raise ConfigError(
            f"data.max-length is {max_length} tokens, and this backbone takes at most "
            f"{tokenizer.model_max_length}."
        )
    columns = [list(column) for column in texts]
    tokens: list[np.ndarray] = []
    types: list[np.ndarray] = []
    lengths: list[int] = []
    for start in range(0, len(columns[0]), _BATCH_ROWS):
        encoded = tokenizer(
            *(column[start : start + _BATCH_ROWS] for column in columns),
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
        )
        ids = encoded["input_ids"]
        lengths += [len(row) for row in ids]
        tokens.append(np.fromiter(chain.from_iterable(ids), dtype=np.int32))
        if "token_type_ids" in encoded:
            rows = encoded["token_type_ids"]
            types.append(np.fromiter(chain.from_iterable(rows), dtype=np.uint8))
    if 0 in lengths:
        raise DataError(
            f"row {lengths.index(0) + 1} of {where} gives no token at all under this backbone's "
            "tokeniser: remove it."
        )
    arrays = {
        "tokens": np.concatenate(tokens),
        "offsets": np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
    }
    if types:
        arrays["types"] = np.concatenate(types)
    return arrays, _pad_id(tokenizer)


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer  # takes seconds, and a start from the cache needs none

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises whatever its many tokenisers raise
        raise DataError(
            f"the tokeniser in {str(folder)!r} cannot be loaded: {_first_line(error)}"
        ) from None


def _pad_id(tokenizer: Any) -> int:
    """The padding token, or the end token of a tokeniser that has none (GPT-2, Llama), or 0."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
