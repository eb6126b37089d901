"""Model a client's texts: joined in the order of the rows, cut into blocks of `data.max-length`.

Texts are tokenised as the tokeniser marks them and joined by its end token, or by `data.separator`
where that is named: a text put behind each. A client's tokens are then cut into blocks; the last
one is shorter, and kept where it has two tokens. No block holds tokens of two clients. All tokens
of a block but its first are labels.

Evaluation rows are packed by client too, where they name one; else all of them together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpet.errors import ConfigError
from fedpet.tasks.causal_lm import CausalTask
from fedpet.tasks.task_kind import Encoding, RawRows, register_task

if TYPE_CHECKING:
    from fedpet.config import DataConfig
    from fedpet.data.padding import Padding
    from fedpet.data.split_rows import Split
    from fedpet.tasks.task import Task

__all__ = ["LanguageModelling"]

_BYTES_A_TOKEN = 4  # of English text, about; for an estimate


@register_task("language-modelling")
class LanguageModelling(CausalTask):
    """Predict each token of texts from those before it in its block."""

    packs = True

    def check_data(self, data: DataConfig) -> None:
        """Refuse more columns than one; see `TaskKind.check_data`."""
        if len(data.text_columns) != 1:
            raise ConfigError(
                f"data.text-columns must name one column for data.task = {data.task!r}, got "
                f"{list(data.text_columns)}."
            )

    def key(self, data: DataConfig) -> dict[str, Any]:
        """Name the separator; see `TaskKind.key`."""
        return {"separator": data.separator}

    def read(self, split: Split, data: DataConfig, task: Task) -> RawRows:
        """Read the texts; see `TaskKind.read`."""
        from fedpet.data.column import Column

        texts = split.texts(data.text_columns)
        split.check_texts(texts, data.text_columns)
        if data.separator:
            texts = [Column([text + data.separator for text in column]) for column in texts]
        return RawRows(texts, np.zeros(len(texts[0]), dtype=np.int64))

    def encode(self, rows: RawRows, how: Encoding) -> tuple[dict[str, Any], Padding]:
        """Tokenise whole texts; `arrange` cuts them. See `TaskKind.encode`."""
        from fedpet.data.column import Selection
        from fedpet.data.tokenize import load_tokenizer, tokenize_rows

        arrays, padding = tokenize_rows(
            [Selection(column, how.numbers) for column in rows.columns],
            how.folder,
            how.data.max_length,
            how.where,
            how.spools,
            how.on_rows,
            whole=True,
        )
        end = None if how.data.separator else load_tokenizer(how.folder).eos_token_id
        arrays.pop("types", None)
        arrays["labels"] = np.diff(arrays["offsets"])
        arrays["end"] = np.array([-1 if end is None else end], dtype=np.int64)
        return arrays, padding

    def arrange(
        self, arrays: Mapping[str, np.ndarray], groups: Sequence[np.ndarray], data: DataConfig
    ) -> tuple[dict[str, Any], np.ndarray]:
        """Join each group's texts and cut them into blocks; see `TaskKind.arrange`."""
        from fedpet.data.array_spool import ArraySpool

        tokens, offsets, end = arrays["tokens"], arrays["offsets"], int(arrays["end"][0])
        spool, lengths, counts = ArraySpool(np.int32), [], []
        for rows in groups:
            stream = _joined(tokens, offsets, rows, end)
            if len(stream) % data.max_length == 1:  # one token predicts nothing
                stream = stream[:-1]
            spool.append(stream)
            whole, rest = divmod(len(stream), data.max_length)
            lengths += [data.max_length] * whole + [rest] * (rest > 0)
            counts.append(whole + (rest > 0))
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        marks = np.ones(starts[-1], dtype=np.uint8)
        marks[starts[:-1]] = 0
        return {
            "tokens": spool,
            "offsets": starts,
            "labels": np.diff(starts) - 1,
            "marks": marks,
        }, np.asarray(counts, dtype=np.int64)

    def sizes(self, rows: RawRows) -> np.ndarray:
        """Reckon the tokens of each text by its bytes; see `TaskKind.sizes`."""
        lengths = (len(text.encode()) for text in rows.columns[0])
        sizes = np.fromiter(lengths, dtype=np.int64, count=len(rows.labels))
        reckoned: np.ndarray = sizes // _BYTES_A_TOKEN + 1
        return reckoned


def _joined(tokens: np.ndarray, offsets: np.ndarray, rows: np.ndarray, end: int) -> np.ndarray:
    """Join texts, each with the end token behind it if it has none: int32."""
    closing = np.array([end], dtype=np.int32)
    pieces = [np.empty(0, dtype=np.int32)]
    for row in rows:
        pieces.append(tokens[offsets[row] : offsets[row + 1]])
        if end >= 0 and pieces[-1][-1:] != closing:
            pieces.append(closing)
    return np.concatenate(pieces)
