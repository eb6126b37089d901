"""Classify texts by a model that writes: each class is a word, and the likeliest is the answer.

The words are the names of the classes (data.label-names, or those of the rows), written behind the
text by an encoder and a decoder, as S3PET trains T5. The loss is the mean cross-entropy of the
word's tokens, its end token too. To evaluate, the decoder scores every class's word behind the same
encoded text; the sum of its tokens' log-probabilities is the class's logit, so that metrics are a
classification's. Nothing is drawn: the model has no head.

Source: Hu et al., NeurIPS 2022 (S3PET), after Raffel et al., JMLR 2020 (T5). Theirs writes freely
and compares strings, which task "seq2seq" measures as exact_match; ours compares the classes' words
alone, so an answer that is no class cannot be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpet.errors import DataError
from fedpet.tasks.classification import Classification
from fedpet.tasks.task_kind import BatchLoss, Encoding, RawRows, refuse_settings, register_task

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from fedpet.config import Experiment
    from fedpet.data.padding import Padding
    from fedpet.data.rows import Rows
    from fedpet.tasks.task import Task

__all__ = ["TextToText"]

_STEP = 512  # rows tokenised at a time
_NO_LABEL = -100


@register_task("text-to-text-classification")
class TextToText(Classification):
    """Give each text one of several classes by writing its word."""

    model_class = "AutoModelForSeq2SeqLM"
    pipeline = "text2text-generation"
    has_head = False
    stacks = False

    def check_experiment(self, experiment: Experiment) -> None:
        """Refuse what belongs to a head; see `TaskKind.check_experiment`."""
        training = experiment.training
        refuse_settings(
            experiment,
            {
                "training.cls-only = true belongs to a head": training.cls_only,
                "training.logit-adjustment shifts logits of a head": bool(
                    training.logit_adjustment
                ),
                "backbone.head = 'new' draws a head": experiment.backbone.head == "new",
            },
        )

    def encode(self, rows: RawRows, how: Encoding) -> tuple[dict[str, Any], Padding]:
        """Tokenise the texts and the classes' words; see `TaskKind.encode`."""
        from fedpet.data.marked_tokens import MarkedTokens

        made = MarkedTokens(how.folder, how.data.max_length, how.where, how.spools)
        start, tokenizer = made.decoder_start(), made.tokenizer
        cut = {
            "truncation": True,
            "max_length": how.data.max_length,
            "return_attention_mask": False,
        }
        for first in range(0, len(how.numbers), _STEP):
            some = how.numbers[first : first + _STEP].tolist()
            texts = [[column[number] for number in some] for column in rows.columns]
            for ids in tokenizer(*texts, **cut)["input_ids"]:
                made.append(ids, [0] * len(ids))
            how.on_rows(first + len(some))
        arrays = made.arrays()
        del arrays["marks"]
        words = [tokenizer(text_target=name)["input_ids"] for name in rows.label_names]
        choices = np.full((len(words), max(map(len, words))), _NO_LABEL, dtype=np.int32)
        for index, word in enumerate(words):
            choices[index, : len(word)] = word
        if len(np.unique(choices, axis=0)) < len(words):
            raise DataError(
                f"two of the classes {', '.join(rows.label_names[:10])} are the same tokens to "
                "this backbone's tokeniser: name them by other words in data.label-names."
            )
        return arrays | {
            "labels": rows.labels[how.numbers],
            "choices": choices,
            "decoder_start": np.array([start]),
        }, made.padding

    def set_labels(self, model_config: Any, task_names: Sequence[str]) -> None:
        """Leave the configuration as it is: the classes are words."""

    def client_loss(
        self, task: Task, labels: np.ndarray, strength: float, device: torch.device
    ) -> BatchLoss:
        """Return the mean cross-entropy of the words' tokens; see `TaskKind.client_loss`."""
        from fedpet.training.token_loss import token_loss  # a later stage

        return lambda model, inputs, targets: token_loss(model, inputs, targets[:, 0], shift=False)

    def weight(self, rows: Rows, indices: np.ndarray) -> int:
        """Count the tokens of the rows' words."""
        assert rows.choices is not None
        lengths = (rows.choices != _NO_LABEL).sum(1)
        return int(lengths[rows.labels[indices]].sum())

    def outputs(self, model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """Return the log-likelihood of each class's word, (rows, classes)."""
        import torch

        from fedpet.training.token_loss import row_sums  # a later stage

        whole: Any = model
        mask = inputs["attention_mask"]
        encoded = whole.get_encoder()(input_ids=inputs["input_ids"], attention_mask=mask)
        own = inputs["decoder_input_ids"]
        pad = _fill_of(whole)
        scores = []
        for word in labels[:, 1:].unbind(1):
            written = torch.where(word == _NO_LABEL, pad, word)[:, :-1]
            decoder = torch.cat([own[:, :1], written], 1)
            call = {
                "encoder_outputs": encoded, "attention_mask": mask, "decoder_input_ids": decoder,
            }  # fmt: skip
            scores.append(-row_sums(model, call, word, shift=False)[:, 0])
        return torch.stack(scores, 1).float()


def _fill_of(model: Any) -> int:
    """Return a token to fill words up with; no label is predicted from it."""
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    return 0 if pad is None else int(pad)
