"""Read texts with a label each, and tokenise them: what classification and regression share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedpet.tasks.task_kind import Encoding, RawRows, TaskKind

if TYPE_CHECKING:
    from fedpet.config import DataConfig
    from fedpet.data.padding import Padding
    from fedpet.data.split_rows import Split
    from fedpet.tasks.task import Task

__all__ = ["LabelledTexts"]


class LabelledTexts(TaskKind):
    """Share how a text, or a pair, with one label becomes an example: cut at `data.max-length`."""

    has_labels = True
    stacks = True

    def read(self, split: Split, data: DataConfig, task: Task) -> RawRows:
        """Read texts and labels; see `TaskKind.read`."""
        from fedpet.tasks.class_labels import encode_labels

        texts, labels = split.texts(data.text_columns), split.labels(data.label_column)
        split.check_texts(texts, data.text_columns)
        kind = "classification" if self.has_classes else "regression"
        codes = encode_labels(labels, kind, task.label_names, split.where)
        return RawRows(texts, codes, task.label_names)

    def encode(self, rows: RawRows, how: Encoding) -> tuple[dict[str, Any], Padding]:
        """Tokenise the texts; see `TaskKind.encode`."""
        from fedpet.data.column import Selection
        from fedpet.data.tokenize import tokenize_rows

        chosen = [Selection(column, how.numbers) for column in rows.columns]
        arrays, padding = tokenize_rows(
            chosen, how.folder, how.data.max_length, how.where, how.spools, how.on_rows
        )
        return arrays | {"labels": rows.labels[how.numbers]}, padding
