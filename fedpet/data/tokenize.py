"""Texts into token ids, by the backbone's own tokeniser.

In:  texts, or pairs of texts, and the tokeniser's folder.
Out: the arrays of `Rows`.

A text is a string with something other than blanks in it; a row without one is refused, not
skipped. Rows are cut at `max_length` tokens, special ones counted, the longer text of a pair first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from fedpet.data.array_spool import ArraySpool
from fedpet.data.column import Column
from fedpet.data.padding import NO_CODE, Padding, config_of, padding_of
from fedpet.data.rows import Rows
from fedpet.data.text_encoder import TextEncoder
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
_SETTINGS = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json"),
    "chat_template.jinja",
)
# Of images and speech.
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
BATCH_ROWS = 8192
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
    if not has_tokenizer(folder):
        raise DataError(
            f"{str(folder)!r} holds no tokeniser: neither tokenizer.json nor "
            f"{', '.join(_VOCABULARY)}. Take a checkpoint that comes with its tokeniser."
        )
    return _hash_files(folder, (*_VOCABULARY, *_SETTINGS))


def has_tokenizer(folder: Path) -> bool:
    """Tell whether a checkpoint comes with a tokeniser."""
    return any((folder / name).is_file() for name in ("tokenizer.json", *_VOCABULARY))


def hash_tokenizer_files(folder: Path) -> str:
    """SHA-256 of all that may decide a token: what the cache goes by, stricter than the plan."""
    return _hash_files(folder, ("tokenizer.json", *_VOCABULARY, *_SETTINGS, *PROCESSOR_FILES))


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
    for row in _doubtful(texts):
        text = texts[row]
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


def _doubtful(texts: Sequence[Any]) -> Iterable[int]:
    """Return the rows to be looked at: in Arrow arrays those without a visible ASCII character."""
    if not isinstance(texts, Column) or not texts.is_text:
        return range(len(texts))
    import pyarrow.compute as pc

    visible = pc.fill_null(pc.match_substring_regex(texts.arrow, "[!-~]"), False)
    rows: list[int] = np.flatnonzero(~visible.to_numpy()).tolist()
    return rows


def tokenize_rows(
    texts: Sequence[Sequence[str]],
    folder: Path,
    max_length: int,
    where: str,
    spools: Path | None = None,
    on_rows: Callable[[int], None] = lambda rows: None,
    *,
    whole: bool = False,
) -> tuple[dict[str, Any], Padding]:
    """Tokenise all rows.

    Args:
        texts: One sequence of n texts, or two for pairs.
        folder: The tokeniser's folder.
        max_length: Tokens a row, special ones counted.
        where: The split, for messages.
        spools: Folder for the tokens as they are made; None takes the system's for such files.
        on_rows: Is called with the number of rows done.
        whole: Cut no text, since `max_length` is of what is made of them.

    Returns:
        `tokens` int32 (num_tokens,) and, where the tokeniser makes token type ids, `types` uint8
        (num_tokens,), each an `ArraySpool`; `offsets` int64 (n + 1,); and what to fill rows up
        with.

    Raises:
        ConfigError: `max_length` is more than the tokeniser's model takes.
        DataError: The tokeniser cannot be loaded, makes no token of a text, or one that the model
            has no row for.
    """
    tokenizer, config = load_tokenizer(folder), config_of(folder)
    padding = padding_of(tokenizer, config, str(folder))
    check_max_length(max_length, tokenizer)
    encoder, num_rows = TextEncoder(tokenizer, None if whole else max_length), len(texts[0])
    end = None if whole else _end_token(config)
    tokens, types = ArraySpool(np.int32, spools), ArraySpool(np.uint8, spools)
    counts, ends, largest, has_types = [], [], -1, False
    for start in range(0, num_rows, BATCH_ROWS):
        encoded = encoder.encode([column[start : start + BATCH_ROWS] for column in texts])
        tokens.append(encoded.ids)
        counts.append(encoded.counts)
        largest = max(largest, int(encoded.ids.max(initial=-1)))
        if encoded.types is not None:
            types.append(encoded.types)
            has_types = True
        if end is not None:
            owners = np.repeat(np.arange(len(encoded.counts)), encoded.counts)
            ends.append(np.bincount(owners[encoded.ids == end], minlength=len(encoded.counts)))
        on_rows(min(start + BATCH_ROWS, num_rows))
    lengths = np.concatenate(counts)
    if not lengths.all():
        raise DataError(
            f"row {int(lengths.argmin()) + 1} of {where} gives no token at all under this "
            "backbone's tokeniser: remove it."
        )
    arrays: dict[str, Any] = {
        "tokens": tokens,
        "offsets": np.concatenate([[0], np.cumsum(lengths)]),
    }
    if has_types:
        arrays["types"] = types
    check_vocabulary(largest, tokenizer, config, where)
    if end is not None:
        _check_ends(np.concatenate(ends), texts[0], tokenizer, end, where)
    return arrays, padding


def check_max_length(max_length: int, tokenizer: Any) -> None:
    """Refuse more tokens a row than the tokeniser's model takes."""
    if max_length > tokenizer.model_max_length:
        raise ConfigError(
            f"data.max-length is {max_length} tokens, and this backbone takes at most "
            f"{tokenizer.model_max_length}."
        )


def probe_rows(folder: Path) -> Rows:
    """One row of a text that is always the same, for a trial where no rows are at hand."""
    arrays, padding = tokenize_rows([["a short text"]], folder, 16, "the text of a trial")
    return Rows(
        tokens=arrays["tokens"].array(),
        offsets=arrays["offsets"],
        labels=np.zeros(1, dtype=np.int64),
        types=arrays["types"].array() if "types" in arrays else None,
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


def check_vocabulary(token_id: int, tokenizer: Any, config: Any, where: str) -> None:
    """Refuse a token that the model has no row for: one that was added to the tokeniser alone."""
    size = getattr(config, "vocab_size", None)
    if size is None or token_id < size:
        return
    word = tokenizer.convert_ids_to_tokens(token_id)
    raise DataError(
        f"a text of {where} holds the token {word!r}, number {token_id} from 0, and this backbone "
        f"has embeddings for {size}: save the checkpoint anew after "
        "model.resize_token_embeddings(len(tokenizer)), or take the token out of the tokeniser."
    )


def _end_token(config: Any) -> int | None:
    """Return the end token of a model whose classifier reads the last of as many in every row.

    Classifiers with an encoder and a decoder (T5, BART) do, and take a batch only where each row
    has as many as the others.
    """
    end = getattr(config, "eos_token_id", None)
    return end if getattr(config, "is_encoder_decoder", False) and isinstance(end, int) else None


def _check_ends(
    counts: np.ndarray, texts: Sequence[str], tokenizer: Any, end: int, where: str
) -> None:
    """Refuse rows with unlike numbers of end tokens, (n,)."""
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
