"""Encode batches of texts by a tokeniser of transformers, without what it does beside that.

In:  columns of texts: one, or two of pairs.
Out: `Encoded`: the same ids and token types that the tokeniser gives when it is called.

A fast tokeniser is called once, on the first row, which sets its truncation. After that texts go to
its backend, or word by word (fedpet/data/word_tokens.py). A slow one, and one whose class encodes
in a way of its own, is called for every batch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from fedpet.data.word_tokens import WordTokens, gather
from fedpet.utils.cores import usable_cores
from fedpet.utils.extras import has_arrow

__all__ = ["Encoded", "TextEncoder"]


@dataclass(frozen=True)
class Encoded:
    """Token ids of some rows, one row after the other: ids and types (num_tokens,), counts (n,)."""

    ids: np.ndarray  # int32
    counts: np.ndarray  # int64, tokens a row
    types: np.ndarray | None  # uint8

    @classmethod
    def of(cls, ids: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None) -> Encoded:
        """Take lists of ids by row."""
        return cls(
            np.fromiter(chain.from_iterable(ids), np.int32),
            np.fromiter(map(len, ids), np.int64, len(ids)),
            None if types is None else np.fromiter(chain.from_iterable(types), np.uint8),
        )


class TextEncoder:
    """Encode texts.

    Args:
        tokenizer: Of transformers.
        max_length: Tokens a row, special ones counted; None cuts none.
    """

    def __init__(self, tokenizer: Any, max_length: int | None) -> None:
        self._tokenizer = tokenizer
        self._options: dict[str, Any] = {"return_attention_mask": False, "truncation": False}
        if max_length is None:
            self._options["verbose"] = False  # of a text beyond what the model takes at once
        else:
            self._options |= {"truncation": True, "max_length": max_length}
        self._encode_batch: Any = None  # of the backend
        self._words: WordTokens | None = None
        self._has_types: bool | None = None  # None before the first batch

    def encode(self, columns: Sequence[Any]) -> Encoded:
        """Encode a batch.

        Args:
            columns: Lists, or Arrow arrays of texts.
        """
        if self._has_types is None:
            self._set_up([_listed(column[:1]) for column in columns])
        if self._words is not None and len(columns) == 1:
            return self._by_words(columns[0], self._words)
        return self._whole(columns)

    def _set_up(self, first: Sequence[Sequence[str]]) -> None:
        self._has_types = "token_type_ids" in self._tokenizer(*first, **self._options)
        if _is_plain(self._tokenizer):
            backend = self._tokenizer.backend_tokenizer
            self._encode_batch = getattr(backend, "encode_batch_fast", backend.encode_batch)
            self._words = WordTokens.of(self._tokenizer) if has_arrow() else None
            if usable_cores() == 1:  # the backend would take all that there are
                os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def _whole(self, columns: Sequence[Any]) -> Encoded:
        texts = [_listed(column) for column in columns]
        if self._encode_batch is None:
            found = self._tokenizer(*texts, **self._options)
            return Encoded.of(found["input_ids"], found.get("token_type_ids"))
        found = self._encode_batch(texts[0] if len(texts) == 1 else list(zip(*texts, strict=True)))
        types = [one.type_ids for one in found] if self._has_types else None
        return Encoded.of([one.ids for one in found], types)

    def _by_words(self, texts: Any, words: WordTokens) -> Encoded:
        import pyarrow as pa

        texts = pa.array(texts, pa.string()) if isinstance(texts, list) else texts
        fits = words.fits(texts)
        ids, counts = words.encode(texts if fits.all() else texts.filter(pa.array(fits)))
        types = np.full(len(ids), words.type_id, np.uint8) if self._has_types else None
        if fits.all():
            return Encoded(ids, counts, types)
        rest = self._whole([texts.filter(pa.array(~fits))])
        order = np.argsort(np.concatenate([np.flatnonzero(fits), np.flatnonzero(~fits)]))
        all_counts = np.concatenate([counts, rest.counts])
        starts = (np.cumsum(all_counts) - all_counts)[order]
        both = np.concatenate([ids, rest.ids])
        mixed = gather(both, starts, all_counts[order])
        if types is not None and rest.types is not None:
            types = gather(np.concatenate([types, rest.types]), starts, all_counts[order])
        return Encoded(mixed, all_counts[order], types)


def _listed(column: Any) -> list[str]:
    return column if isinstance(column, list) else list(column.to_pylist())


def _is_plain(tokenizer: Any) -> bool:
    """Test that calling a tokeniser does no more than its backend does."""
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    kind = type(tokenizer)
    return (
        isinstance(tokenizer, TokenizersBackend)
        and kind.__call__ is PreTrainedTokenizerBase.__call__
        and kind._encode_plus is TokenizersBackend._encode_plus
        and kind._convert_encoding is TokenizersBackend._convert_encoding
    )
