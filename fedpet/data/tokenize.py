"""Texts into token ids, by the backbone's own tokeniser.

In:  texts, or pairs of texts, and the tokeniser's folder.
Out: the arrays of `Rows`.

A text is a string with something other than blanks in it; a row without one is refused, not
skipped. Rows are cut at `max_length` tokens, special ones counted, the longer text of a pair first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from fedpet.data.padding import NO_CODE, Padding, config_of, padding_of
from fedpet.data.rows import Rows
from fedpet.errors import ConfigError, DataError

# A hash is taken over those that are there: a name may be added, and old hashes stay.
_VOCABULARY = (
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "spm.model",
    "spm_char.model",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "source.spm",
    "target.spm",
    "bpe.codes",
    "dict.txt",
    "prophetnet.tokenizer",
    "tekken.json",
)
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")
_BATCH_ROWS = 2048
# Later ones want a protobuf from 7 on, which Flower does not take; transformers then asks for
# tiktoken, which cannot read the file either.
_SENTENCEPIECE = "sentencepiece<0.2.3"


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


def tokenize_rows(
    texts: Sequence[Sequence[str]], folder: Path, max_length: int, where: str
) -> tuple[dict[str, np.ndarray], Padding]:
    """Tokenise all rows.

    Args:
        texts: One sequence of n texts, or two for pairs.
        folder: The tokeniser's folder.
        max_length: Tokens a row, special ones counted.
        where: The split, for messages.

    Returns:
        `tokens` int32 (num_tokens,), `offsets` int64 (n + 1,), and `types` uint8 (num_tokens,)
        where the tokeniser makes token type ids; and what to fill rows up with.

    Raises:
        ConfigError: `max_length` is more than the tokeniser's model takes.
        DataError: The tokeniser cannot be loaded, makes no token of a text, or one that the model
            has no row for.
    """
    tokenizer, config = load_tokenizer(folder), config_of(folder)
    padding = padding_of(tokenizer, config, str(folder))
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
    _check_vocabulary(arrays["tokens"], tokenizer, config, where)
    _check_ends(arrays["tokens"], np.asarray(lengths), columns[0], tokenizer, config, where)
    return arrays, padding


def probe_rows(folder: Path) -> Rows:
    """One row of a text that is always the same, for a trial where no rows are at hand."""
    arrays, padding = tokenize_rows([["a short text"]], folder, 16, "the text of a trial")
    return Rows(
        tokens=arrays["tokens"],
        offsets=arrays["offsets"],
        labels=np.zeros(1, dtype=np.int64),
        types=arrays.get("types"),
        pad_id=padding.token,
        pad_left=padding.left,
    )


def load_tokenizer(folder: Path) -> Any:
    """Load a checkpoint's own tokeniser by transformers.

    Raises:
        DataError: It cannot be loaded, or transformers found no vocabulary for it.
    """
    from transformers import AutoTokenizer  # takes seconds, and a start from the cache needs none

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **NO_CODE)
    except Exception as error:  # transformers raises whatever its many tokenisers raise
        reason = _first_line(error)
        if _is_sentencepiece_alone(folder):
            reason = (
                f"it is a sentencepiece model, to be read by `pip install '{_SENTENCEPIECE}'`"
                f"{f' ({reason})' if find_spec('sentencepiece') else ''}."
            )
        elif "trust_remote_code" in str(error):
            reason = "it is code that comes with the checkpoint, which fedpet does not run."
        raise DataError(f"the tokeniser in {str(folder)!r} cannot be loaded: {reason}") from None
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # it loads without a vocabulary too
        raise DataError(
            f"the tokeniser in {str(folder)!r} knows special tokens alone: "
            f"{type(tokenizer).__name__} found no vocabulary of the name that it looks for. Take a "
            "checkpoint with tokenizer.json."
        )
    return tokenizer


def _is_sentencepiece_alone(folder: Path) -> bool:
    models = [*folder.glob("*.model"), *folder.glob("*.spm")]
    return bool(models) and not (folder / "tokenizer.json").is_file()


def _check_vocabulary(tokens: np.ndarray, tokenizer: Any, config: Any, where: str) -> None:
    """Refuse a token that the model has no row for: one that was added to the tokeniser alone."""
    size = getattr(config, "vocab_size", None)
    if size is None or tokens.max() < size:
        return
    token_id = int(tokens.max())
    word = tokenizer.convert_ids_to_tokens(token_id)
    raise DataError(
        f"a text of {where} holds the token {word!r}, number {token_id} from 0, and this backbone "
        f"has embeddings for {size}: save the checkpoint anew after "
        "model.resize_token_embeddings(len(tokenizer)), or take the token out of the tokeniser."
    )


def _check_ends(
    tokens: np.ndarray,
    lengths: np.ndarray,
    texts: Sequence[str],
    tokenizer: Any,
    config: Any,
    where: str,
) -> None:
    """Refuse rows with unlike numbers of end tokens under a model that reads the last one.

    Classifiers with an encoder and a decoder (T5, BART) do, and take a batch only where each row
    has as many as the others.
    """
    end = getattr(config, "eos_token_id", None)
    if not getattr(config, "is_encoder_decoder", False) or not isinstance(end, int):
        return
    owners = np.repeat(np.arange(len(lengths)), lengths)[tokens == end]
    counts = np.bincount(owners, minlength=len(lengths))
    usual = max(int(np.median(counts)), 1)
    for row in np.flatnonzero(counts != usual).tolist():
        raise DataError(
            f"the text {texts[row][:40]!r} of {where} comes to {counts[row]} end tokens "
            f"({tokenizer.convert_ids_to_tokens(end)!r}), and this backbone's classifier reads "
            f"the last of as many in every row, here {usual}: take what spells the token out of "
            "the text, or take a tokeniser that ends each text with it."
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
