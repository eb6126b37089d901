"""A task of one's own: predict only every second word of a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from fedpet import TaskKind, register_task
from fedpet.data.padding import Padding
from fedpet.data.split_rows import Split
from fedpet.data.tokenize import load_tokenizer
from fedpet.tasks import Encoding, RawRows, Task
from fedpet.tasks.causal_lm import CausalTask

assert issubclass(CausalTask, TaskKind)


@register_task("every-second-word")
class EverySecondWord(CausalTask):
    """Texts whose words with an odd number are labels."""

    metrics: ClassVar[Mapping[str, Callable[..., float]]] = {
        **CausalTask.metrics,
        "misses": lambda losses, hits, tokens: float(tokens.sum() - hits.sum()),
    }
    lower_is_better = CausalTask.lower_is_better | {"misses"}

    def read(self, split: Split, data: Any, task: Task) -> RawRows:
        texts = split.texts(data.text_columns)
        split.check_texts(texts, data.text_columns)
        return RawRows(texts, np.zeros(len(texts[0]), dtype=np.int64))

    def encode(self, rows: RawRows, how: Encoding) -> tuple[dict[str, Any], Padding]:
        tokenizer = load_tokenizer(how.folder)
        ids = [
            tokenizer(rows.columns[0][n])["input_ids"][: how.data.max_length] for n in how.numbers
        ]
        marks = [[place % 2 for place in range(len(one))] for one in ids]
        return {
            "tokens": np.concatenate(ids).astype(np.int32),
            "marks": np.concatenate(marks).astype(np.uint8),
            "offsets": np.concatenate([[0], np.cumsum([len(one) for one in ids])]),
            "labels": np.array([sum(one) for one in marks], dtype=np.int64),
        }, Padding(tokenizer.pad_token_id)
