"""Train on the answers of conversations: a chat template over the turns, loss on answers alone.

A row is a conversation: `data.messages-column` holds its turns, a list of {"role", "content"}, as
datasets for chat have them; or `data.text-columns` hold a question, in parts that are joined by an
empty line, and `data.response-column` its answer, as FlowerTune's tasks have them. What a model
reads and which tokens are labels: fedpet/tasks/chat_spans.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpet.errors import ConfigError, DataError
from fedpet.tasks.causal_lm import CausalTask
from fedpet.tasks.chat_spans import ASSISTANT, ChatRenderer, Turns
from fedpet.tasks.task_kind import Encoding, RawRows, register_task

if TYPE_CHECKING:
    from fedpet.config import DataConfig
    from fedpet.data.padding import Padding
    from fedpet.data.split_rows import Split
    from fedpet.tasks.task import Task

__all__ = ["Instruction"]

_STEP = 512  # rows between two reports


@register_task("instruction")
class Instruction(CausalTask):
    """Predict the answers of conversations from the turns before them."""

    written_metrics = frozenset({"exact_match", "rouge_l", "chrf", "bleu"})

    def check_data(self, data: DataConfig) -> None:
        """Ask for one of both kinds of columns; see `TaskKind.check_data`."""
        if bool(data.messages_column) == bool(data.response_column):
            raise ConfigError(
                f"data.task = {data.task!r} reads turns from data.messages-column, or questions "
                "from data.text-columns and answers from data.response-column: name one of "
                f"messages-column and response-column, got {data.messages_column!r} and "
                f"{data.response_column!r}."
            )

    def columns(self, data: DataConfig) -> tuple[str, ...]:
        """Name the turns, or the questions: equal ones fall on one side."""
        return (data.messages_column,) if data.messages_column else data.text_columns

    def key(self, data: DataConfig) -> dict[str, Any]:
        """Name the columns; see `TaskKind.key`."""
        return {"messages_column": data.messages_column, "response_column": data.response_column}

    def read(self, split: Split, data: DataConfig, task: Task) -> RawRows:
        """Read and check the turns; see `TaskKind.read`."""
        from fedpet.data.column import Column

        found = _from_messages(split, data) if data.messages_column else _from_texts(split, data)
        rows: list[Any] = []
        for number, turns in enumerate(found):
            where = f"row {number + 1} of {split.where}"
            if not any(role == ASSISTANT and text.strip() for role, text in turns):
                raise DataError(
                    f"{where} has no answer, a turn of the role {ASSISTANT!r} with a text: there "
                    "is nothing to learn from it. Remove the row, or check "
                    f"data.{'messages' if data.messages_column else 'response'}-column."
                )
            if not all(_is_unicode(text) for _, text in turns):
                raise DataError(f"{where} has a text that is no Unicode: mend or remove the row.")
            rows.append(turns)
        return RawRows([Column(rows)], np.zeros(len(rows), dtype=np.int64))

    def encode(self, rows: RawRows, how: Encoding) -> tuple[dict[str, Any], Padding]:
        """Render, tokenise and mark the conversations; see `TaskKind.encode`."""
        from fedpet.data.marked_tokens import MarkedTokens

        made = MarkedTokens(how.folder, how.data.max_length, how.where, how.spools)
        renderer = ChatRenderer(made.tokenizer, how.data.max_length, str(how.folder))
        for done, number in enumerate(how.numbers.tolist(), start=1):
            made.append(*renderer.encode(rows.columns[0][number], number, how.where))
            if done % _STEP == 0 or done == len(how.numbers):
                how.on_rows(done)
        return made.arrays(), made.padding

    def tokenizer_hash(self, folder: Path) -> str:
        """Hash the chat template with the tokeniser; see `TaskKind.tokenizer_hash`."""
        found = super().tokenizer_hash(folder)
        template, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
        text = ""
        if template.is_file():
            text = template.read_text(encoding="utf-8")
        elif settings.is_file():
            stored = json.loads(settings.read_text(encoding="utf-8"))
            text = json.dumps(stored.get("chat_template"), sort_keys=True)
        return hashlib.sha256(f"{found}\0{text}".encode()).hexdigest()


def _from_messages(split: Split, data: DataConfig) -> Iterator[Turns]:
    """Yield the turns of each row."""
    column = split.read().column(data.messages_column, "data.messages-column", split.where)
    for number, value in enumerate(column):
        try:
            turns = json.loads(value) if isinstance(value, str) else value
            yield tuple((_text(turn["role"]), _text(turn["content"])) for turn in turns)
        except (TypeError, KeyError, ValueError):
            raise DataError(
                f"row {number + 1} of {split.where} has no turns in column "
                f"{data.messages_column!r}: it must hold a list of "
                '{"role": "user", "content": "..."}, with texts in both.'
            ) from None


def _from_texts(split: Split, data: DataConfig) -> Iterator[Turns]:
    """Yield a question and its answer of each row."""
    table, names = split.read(), (*data.text_columns, data.response_column)
    keys = ["data.text-columns"] * len(data.text_columns) + ["data.response-column"]
    columns = [table.column(n, key, split.where) for n, key in zip(names, keys, strict=True)]
    for number, values in enumerate(zip(*columns, strict=True)):
        for name, value in zip(names, values, strict=True):
            if value is not None and not isinstance(value, str):
                raise DataError(
                    f"row {number + 1} of {split.where} has {type(value).__name__} in column "
                    f"{name!r}, where a text should be: mend or remove the row."
                )
        *parts, answer = ((value or "") for value in values)
        question = "\n\n".join(part for part in parts if part.strip())
        if not question:
            raise DataError(
                f"row {number + 1} of {split.where} asks nothing: all of "
                f"{', '.join(data.text_columns)} are empty. Remove the row."
            )
        yield ("user", question), (ASSISTANT, answer)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
