"""Write a text for a text, by a model with an encoder and a decoder (T5, BART).

`data.text-columns` name the source, or a pair that the tokeniser joins, and `data.response-column`
the target. Each is tokenised as the tokeniser marks it, and cut at `data.max-length` tokens. The
decoder reads the target shifted right behind the start token that the model's configuration names;
all tokens of the target are labels, its end token too. Labels are not smoothed.

A classification as text to text, as T5's, has the class's word as its target. `exact_match` is the
share of rows whose target's every token is predicted from those before it: greedy decoding then
writes the target and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedpet.errors import ConfigError
from fedpet.tasks.causal_lm import CausalTask
from fedpet.tasks.task_kind import BatchLoss, Encoding, RawRows, register_task

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from fedpet.config import DataConfig
    from fedpet.data.padding import Padding
    from fedpet.data.split_rows import Split
    from fedpet.tasks.task import Task

__all__ = ["Seq2Seq"]

_STEP = 512  # rows tokenised at a time


def _exact_match(losses: np.ndarray, hits: np.ndarray, tokens: np.ndarray) -> float:
    return float(np.mean(hits == tokens))


@register_task("seq2seq")
class Seq2Seq(CausalTask):
    """Predict each token of a target from the source and the target's tokens before it."""

    metrics: ClassVar[Mapping[str, Callable[..., float]]] = {
        **CausalTask.metrics,
        "exact_match": _exact_match,
    }
    written_metrics = frozenset({"rouge_l", "chrf", "bleu", "wer", "cer"})
    lower_is_better = CausalTask.lower_is_better | {"wer", "cer"}
    model_class = "AutoModelForSeq2SeqLM"
    pipeline = "text2text-generation"

    def check_data(self, data: DataConfig) -> None:
        """Ask for a target; see `TaskKind.check_data`."""
        super().check_data(data)
        if not data.response_column:
            raise ConfigError(
                f"data.task = {data.task!r} writes the text of data.response-column, and none is "
                "named: name the column of the targets."
            )

    def key(self, data: DataConfig) -> dict[str, Any]:
        """Name the target's column; see `TaskKind.key`."""
        return {"response_column": data.response_column}

    def read(self, split: Split, data: DataConfig, task: Task) -> RawRows:
        """Read sources and targets; see `TaskKind.read`."""
        names = (*data.text_columns, data.response_column)
        texts = [split.read().column(n, "data.response-column", split.where) for n in names[-1:]]
        texts = [*split.texts(data.text_columns), *texts]
        split.check_texts(texts, names)
        return RawRows(texts, np.zeros(len(texts[0]), dtype=np.int64))

    def encode(self, rows: RawRows, how: Encoding) -> tuple[dict[str, Any], Padding]:
        """Tokenise sources and targets, one behind the other; see `TaskKind.encode`."""
        from fedpet.data.marked_tokens import MarkedTokens

        made = MarkedTokens(how.folder, how.data.max_length, how.where, how.spools)
        start, tokenizer = made.decoder_start(), made.tokenizer
        cut = {
            "truncation": True,
            "max_length": how.data.max_length,
            "return_attention_mask": False,
        }
        *sources, targets = rows.columns
        for first in range(0, len(how.numbers), _STEP):
            some = how.numbers[first : first + _STEP]
            texts = [[column[number] for number in some.tolist()] for column in sources]
            asked = tokenizer(*texts, **cut)["input_ids"]
            wanted = tokenizer(text_target=[targets[n] for n in some.tolist()], **cut)["input_ids"]
            for source, target in zip(asked, wanted, strict=True):
                made.append([*source, *target], [0] * len(source) + [1] * len(target))
            how.on_rows(first + len(some))
        return made.arrays() | {"decoder_start": np.array([start])}, made.padding

    def client_loss(
        self, task: Task, labels: np.ndarray, strength: float, device: torch.device
    ) -> BatchLoss:
        """Return the mean cross-entropy of target tokens; see `TaskKind.client_loss`."""
        from fedpet.training.token_loss import token_loss  # a later stage

        return lambda model, inputs, targets: token_loss(model, inputs, targets, shift=False)

    def outputs(self, model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """Return each row's summed loss and its predicted target tokens, (rows, 2)."""
        from fedpet.training.token_loss import row_sums  # a later stage

        return row_sums(model, inputs, labels, shift=False)
