"""Tokenise each distinct word once, where a tokeniser looks at one word after the other.

In:  a fast tokeniser as it is set up, and Arrow arrays of texts.
Out: their token ids, the same as the tokeniser's own; None where that cannot be known.

A text is cut before each blank. BERT's tokenisers (WordPiece) and GPT-2's (byte-level BPE) treat
what lies between as if it stood alone, as far as a text is plain ASCII and holds none of the tokens
that were added to the vocabulary: for GPT-2's, with no more than one blank between two words. Other
texts are left to the tokeniser, and so is every text of other tokenisers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

__all__ = ["WordTokens", "gather"]

_CONTROL = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"
_LAYOUT = r"[\t\n\r]|  "  # beside control characters
_CUT = "\x1f"
_BATCH_WORDS = 2048
_MOST_WORDS = 1 << 17  # that are remembered


def gather(flat: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Join the parts of an array that begin at `starts`, of these lengths."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return flat[np.repeat(starts - (ends - lengths), lengths) + np.arange(total)]


@dataclass
class WordTokens:
    """Tokenise texts word by word.

    Attributes:
        backend: Tokeniser of `tokenizers`.
        unfit: Regular expression (RE2) of what a text must not hold.
        added: Tokens that a text must not hold either.
        before: Ids of the special tokens before a text.
        after: Ids of those behind it.
        room: Most tokens between them.
        type_id: Of every token.
    """

    backend: Any
    unfit: str
    added: Sequence[str]
    before: list[int]
    after: list[int]
    room: int
    type_id: int
    _words: Any = None  # Arrow array of those remembered
    _ids: np.ndarray = field(
        default_factory=lambda: np.empty(0, np.int32)
    )  # of one after the other
    _lengths: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    @classmethod
    def of(cls, tokenizer: Any) -> WordTokens | None:
        """Take a tokeniser of transformers, set up to truncate; None where words are not enough."""
        backend = tokenizer.backend_tokenizer
        cut = backend.truncation
        added = list(tokenizer.added_tokens_decoder.values())
        unfit = _unfit(backend, any(token.normalized for token in added))
        if unfit is None or backend.padding or not cut or cut["direction"] != "right":
            return None
        whole, alone = backend.encode("a"), backend.encode("a", add_special_tokens=False)
        mask = np.array(whole.special_tokens_mask)
        inside = np.flatnonzero(mask == 0)
        if not len(inside) or len(set(whole.type_ids)) > 1:
            return None
        before, after = whole.ids[: inside[0]], whole.ids[inside[-1] + 1 :]
        room = cut["max_length"] - len(before) - len(after)
        if before + alone.ids + after != whole.ids or room < 1:
            return None
        texts = [token.content for token in added]
        return cls(backend, unfit, texts, before, after, room, whole.type_ids[0])

    def fits(self, texts: Any) -> np.ndarray:
        """Tell the texts that can be cut into words: bool, (n,)."""
        import pyarrow.compute as pc

        unfit = pc.match_substring_regex(texts, self.unfit)
        unfit = pc.or_(unfit, pc.invert(pc.string_is_ascii(texts)))
        if self.added:
            pattern = "|".join(map(re.escape, self.added))
            unfit = pc.or_(unfit, pc.match_substring_regex(texts, pattern))
        fits: np.ndarray = pc.invert(unfit).to_numpy(zero_copy_only=False)
        return fits

    def encode(self, texts: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return the token ids of texts that fit, one after the other, and how many each has."""
        import pyarrow.compute as pc

        cut = pc.split_pattern(pc.replace_substring(texts, " ", _CUT + " "), _CUT)
        words = cut.flatten().dictionary_encode()
        codes = self._codes(words.dictionary)[words.indices.to_numpy()]
        lengths = self._lengths[codes]  # of the words
        starts = (np.cumsum(self._lengths) - self._lengths)[codes]
        ends = np.concatenate([[0], np.cumsum(lengths)])[
            cut.offsets.to_numpy() - cut.offsets[0].as_py()
        ]
        inside = np.minimum(np.diff(ends), self.room)
        counts = inside + len(self.before) + len(self.after)
        first = np.cumsum(counts) - counts  # of each text
        ids = np.empty(int(counts.sum()), dtype=np.int32)
        places = np.repeat(first + len(self.before) - (np.cumsum(inside) - inside), inside)
        ids[places + np.arange(len(places))] = gather(
            gather(self._ids, starts, lengths), ends[:-1], inside
        )
        for place, token in enumerate(self.before):
            ids[first + place] = token
        for place, token in enumerate(self.after):
            ids[first + inside + len(self.before) + place] = token
        return ids, counts

    def _codes(self, words: Any) -> np.ndarray:
        """Return the places of words among those remembered; new ones are tokenised."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if self._words is None or len(self._words) > _MOST_WORDS:
            self._words, self._ids, self._lengths = (
                words.slice(0, 0),
                self._ids[:0],
                self._lengths[:0],
            )
        codes = pc.index_in(words, self._words)
        if codes.null_count:
            new = words.filter(codes.is_null())
            for start in range(0, len(new), _BATCH_WORDS):
                batch = new.slice(start, _BATCH_WORDS).to_pylist()
                found = self.backend.encode_batch_fast(batch, add_special_tokens=False)
                ids = [one.ids for one in found]
                flat = np.fromiter(chain.from_iterable(ids), np.int32)
                self._ids = np.concatenate([self._ids, flat])
                self._lengths = np.concatenate([self._lengths, [*map(len, ids)]])
            self._words = pa.concat_arrays([self._words, new])
            codes = pc.index_in(words, self._words)
        places: np.ndarray = codes.to_numpy()
        return places


def _unfit(backend: Any, any_normalized: bool) -> str | None:
    """Return what a text must not hold for its words to stand alone; None if that is not enough."""
    from tokenizers import models, normalizers, pre_tokenizers

    before, model = backend.pre_tokenizer, backend.model
    if isinstance(backend.normalizer, normalizers.BertNormalizer):
        pieces = isinstance(before, pre_tokenizers.BertPreTokenizer)
        if pieces and isinstance(model, models.WordPiece) and not any_normalized:
            return _CONTROL
    elif backend.normalizer is None and isinstance(before, pre_tokenizers.ByteLevel):
        plain = before.use_regex and not before.add_prefix_space
        if plain and isinstance(model, models.BPE) and not model.dropout:
            return f"{_CONTROL}|{_LAYOUT}"
    return None
