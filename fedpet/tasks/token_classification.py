"""Give each word of a text a class: named entities, parts of speech.

`data.text-columns` names one column of lists of words, `data.label-column` one of lists of as many
tags. Words are cut into tokens by the checkpoint's tokeniser; the first token of a word has the
word's tag, the others none, and the loss is the mean cross-entropy over tagged tokens. A row is cut
at `data.max-length` tokens: words behind that are neither learned nor counted.

Metrics are over all tagged words. An entity is right where its kind, first and last word are; its
F1 counts entities of all kinds together. Tags without an entity's prefix ("NOUN") make no entities:
take "token_accuracy" for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedpet.errors import ConfigError, DataError
from fedpet.tasks.entity_spans import spans_of
from fedpet.tasks.task_kind import (
    BatchLoss,
    Encoding,
    RawRows,
    TaskKind,
    refuse_class_settings,
    refuse_settings,
    register_task,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from fedpet.config import DataConfig, Experiment
    from fedpet.data.padding import Padding
    from fedpet.data.rows import Rows
    from fedpet.data.split_rows import Split
    from fedpet.tasks.task import Task

__all__ = ["TokenClassification"]

_STEP = 512  # rows tokenised at a time
_NUMBERS = 6  # a row: see `TokenClassification.outputs`


# Of a table of numbers by row, (n, 6), see `TokenClassification.outputs`.


def _token_accuracy(numbers: np.ndarray) -> float:
    _, hits, words, *_ = numbers.sum(0)
    return float(hits / words)


def _loss(numbers: np.ndarray) -> float:
    loss, _, words, *_ = numbers.sum(0)
    return float(loss / words)


def _precision(numbers: np.ndarray) -> float:
    *_, right, predicted, _ = numbers.sum(0)
    return float(right / predicted) if predicted else 0.0


def _recall(numbers: np.ndarray) -> float:
    *_, right, _, true = numbers.sum(0)
    return float(right / true) if true else 0.0


def _f1(numbers: np.ndarray) -> float:
    *_, right, predicted, true = numbers.sum(0)
    return float(2 * right / (predicted + true)) if predicted + true else 0.0


@register_task("token-classification")
class TokenClassification(TaskKind):
    """Give each word of a text a class."""

    metrics: ClassVar[Mapping[str, Callable[..., float]]] = {
        "entity_f1": _f1,
        "entity_precision": _precision,
        "entity_recall": _recall,
        "token_accuracy": _token_accuracy,
        "loss": _loss,
    }
    lower_is_better = frozenset({"loss"})
    model_class = "AutoModelForTokenClassification"
    pipeline = "token-classification"
    has_labels = True
    has_classes = True
    has_label_lists = True

    def check_data(self, data: DataConfig) -> None:
        """Refuse more columns than one; see `TaskKind.check_data`."""
        if len(data.text_columns) != 1:
            raise ConfigError(
                f"data.text-columns must name one column of lists of words for data.task = "
                f"{data.task!r}, got {list(data.text_columns)}."
            )

    def check_experiment(self, experiment: Experiment) -> None:
        """Refuse what goes by a row's class or first token; see `TaskKind.check_experiment`."""
        cls_only = experiment.training.cls_only
        reason = "training.cls-only = true skips tokens that a classifier of texts never reads"
        refuse_settings(experiment, {reason: cls_only})
        refuse_class_settings(experiment)

    def read(self, split: Split, data: DataConfig, task: Task) -> RawRows:
        """Read words and tags; see `TaskKind.read`."""
        from fedpet.data.column import Column
        from fedpet.tasks.label_lists import encode_lists, read_lists

        column = split.read().column(data.text_columns[0], "data.text-columns", split.where)
        words = list(read_lists(column, split.where))
        tags = list(read_lists(split.labels(data.label_column), split.where))
        for number, (own, theirs) in enumerate(zip(words, tags, strict=True)):
            where = f"row {number + 1} of {split.where}"
            if not own or not all(isinstance(word, str) for word in own):
                raise DataError(
                    f"{where} must have a list of words in column {data.text_columns[0]!r}, at "
                    f"least one, got {own!r:.60}: mend or remove the row."
                )
            if len(own) != len(theirs):
                raise DataError(
                    f"{where} has {len(own)} words and {len(theirs)} tags: give each word one in "
                    f"column {data.label_column!r}, or remove the row."
                )
        codes, lengths = encode_lists(tags, task.label_names, split.where)
        each = np.split(codes, np.cumsum(lengths)[:-1])
        return RawRows([Column(words), Column([one.tolist() for one in each])], lengths)

    def encode(self, rows: RawRows, how: Encoding) -> tuple[dict[str, Any], Padding]:
        """Tokenise the words, and tag the first token of each; see `TaskKind.encode`."""
        from fedpet.data.marked_tokens import MarkedTokens

        made = MarkedTokens(how.folder, how.data.max_length, how.where, how.spools, np.int16)
        if hasattr(made.tokenizer, "add_prefix_space"):  # GPT-2's: else it takes no single words
            made.tokenizer.add_prefix_space = True
        words, tags = rows.columns
        for first in range(0, len(how.numbers), _STEP):
            some = how.numbers[first : first + _STEP].tolist()
            found = made.tokenizer(
                [words[number] for number in some],
                is_split_into_words=True,
                truncation=True,
                max_length=how.data.max_length,
            )
            for index, number in enumerate(some):
                marks = _first_tokens(found.word_ids(index), tags[number])
                if not any(marks):
                    raise DataError(
                        f"row {number + 1} of {how.where} has no word that this backbone's "
                        "tokeniser makes a token of: remove it."
                    )
                made.append(found["input_ids"][index], marks)
            how.on_rows(first + len(some))
        arrays = made.arrays()
        return arrays | {"tags": arrays.pop("marks")}, made.padding

    def set_labels(self, model_config: Any, task_names: Sequence[str]) -> None:
        """Write the tags into a model's configuration before it is built."""
        model_config.id2label = dict(enumerate(task_names))
        model_config.label2id = {name: index for index, name in enumerate(task_names)}

    def client_loss(
        self, task: Task, labels: np.ndarray, strength: float, device: torch.device
    ) -> BatchLoss:
        """Return the mean cross-entropy of tagged tokens; see `TaskKind.client_loss`."""
        from torch.nn.functional import cross_entropy

        return lambda model, inputs, targets: cross_entropy(
            model(**inputs).logits.flatten(0, 1), targets.flatten()
        )

    def weight(self, rows: Rows, indices: np.ndarray) -> int:
        """Count the tagged words."""
        return int(rows.labels[indices].sum())

    def outputs(self, model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """Return for each row sums and counts, (rows, 6).

        They are: the summed loss, tags predicted, tagged words; entities predicted that are there,
        entities predicted, entities that are there.
        """
        import torch
        from torch.nn.functional import cross_entropy

        whole: Any = model
        logits, names = whole(**inputs).logits.float(), whole.config.id2label
        losses = cross_entropy(logits.transpose(1, 2), labels, reduction="none").double()
        predicted, tagged = logits.argmax(-1), labels >= 0
        sums = [losses.sum(1), ((predicted == labels) & tagged).sum(1), tagged.sum(1)]
        counts = []
        rows = (x.cpu().numpy() for x in (predicted, labels, tagged))
        for own, true, there in zip(*rows, strict=True):
            ours, theirs = (spans_of([names[tag] for tag in row[there]]) for row in (own, true))
            counts.append([len(ours & theirs), len(ours), len(theirs)])
        return torch.cat(
            [torch.stack(sums, 1).double(), torch.tensor(counts, device=labels.device).double()], 1
        )

    def check_outputs(self, task: Task, outputs: np.ndarray, labels: np.ndarray) -> None:
        """Refuse outputs of another shape; see `TaskKind.check_outputs`."""
        if not len(labels) or outputs.shape != (len(labels), _NUMBERS):
            raise ValueError(
                f"{len(labels)} rows need outputs of shape ({len(labels)}, {_NUMBERS}) with at "
                f"least one row, got {outputs.shape}."
            )

    def compared(self, task: Task, outputs: np.ndarray, labels: np.ndarray) -> tuple[Any, ...]:
        """Return the numbers by row, see `outputs`."""
        return (outputs,)


def _first_tokens(word_of: Sequence[int | None], tags: Sequence[int]) -> list[int]:
    """Return for each token 1 + its word's tag where it is the word's first, else 0."""
    marks, before = [], None
    for word in word_of:
        marks.append(0 if word is None or word == before else tags[word] + 1)
        before = word
    return marks
