"""Collect rows of tokens some of which are labels, by a checkpoint's own tokeniser.

In:  the tokeniser's folder, then token ids and a mark for each, row by row.
Out: the arrays of `Rows`, and what fills rows up.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedpet.data.array_spool import ArraySpool
from fedpet.data.padding import config_of, padding_of
from fedpet.data.tokenize import check_max_length, check_vocabulary, load_tokenizer
from fedpet.errors import BackboneError

__all__ = ["MarkedTokens"]


class MarkedTokens:
    """Collect rows.

    Args:
        folder: The tokeniser's.
        max_length: Tokens of a row, at most.
        where: The split, for messages.
        spools: Folder for what outgrows memory.
        marks: Of which integers a mark is.

    Attributes:
        tokenizer: Of transformers.
        config: Of the model; None where transformers reads none.
        padding: What rows are filled up with.

    Raises:
        ConfigError: `max_length` is more than the tokeniser's model takes.
        DataError: The tokeniser cannot be loaded, or nothing can stand for padding.
    """

    def __init__(
        self,
        folder: Path,
        max_length: int,
        where: str,
        spools: Path | None = None,
        marks: type[np.integer[Any]] = np.uint8,
    ) -> None:
        self.tokenizer, self.config = load_tokenizer(folder), config_of(folder)
        check_max_length(max_length, self.tokenizer)
        self.padding = padding_of(self.tokenizer, self.config, str(folder))
        self._folder, self._where = folder, where
        self._tokens, self._marks = ArraySpool(np.int32, spools), ArraySpool(marks, spools)
        self._lengths: list[int] = []
        self._counts: list[int] = []
        self._largest = -1

    def append(self, ids: Sequence[int], marks: Sequence[int]) -> None:
        """Add a row; a mark above 0 is a label's."""
        marked = np.asarray(marks, dtype=self._marks.dtype)
        self._tokens.append(np.asarray(ids, dtype=np.int32))
        self._marks.append(marked)
        self._lengths.append(len(ids))
        self._counts.append(int(np.count_nonzero(marked)))
        self._largest = max(self._largest, *ids)

    def arrays(self) -> dict[str, Any]:
        """Return `tokens`, `marks`, `offsets`, and as `labels` the labels of each row.

        Raises:
            DataError: The model has no row for a token.
        """
        check_vocabulary(self._largest, self.tokenizer, self.config, self._where)
        return {
            "tokens": self._tokens,
            "marks": self._marks,
            "offsets": np.concatenate([[0], np.cumsum(self._lengths)]).astype(np.int64),
            "labels": np.asarray(self._counts, dtype=np.int64),
        }

    def decoder_start(self) -> int:
        """Return the token with which a decoder begins.

        Raises:
            BackboneError: The model's configuration names none.
        """
        start = getattr(self.config, "decoder_start_token_id", None)
        if start is None:
            raise BackboneError(
                f"the configuration in {str(self._folder)!r} names no decoder_start_token_id, with "
                "which a decoder begins: take a model with an encoder and a decoder (T5, BART)."
            )
        return int(start)
