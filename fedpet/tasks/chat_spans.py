"""Render conversations by a tokeniser's chat template, and mark the tokens of the answers.

In:  turns of (role, text), a tokeniser with a template, the most tokens.
Out: token ids, and which of them are an answer's.

Where the template marks what is generated, its marks are taken. Else an answer is found by ids: the
conversation is rendered again with another word in the answer's place, and the answer is what is
not the same in both. The special token behind it, which ends the turn, belongs to it; what follows
does not. So the rest of a template may depend on which turn is the last, as where it drops earlier
reasoning.

A conversation that is too long loses its oldest exchanges first; a system turn at its head stays.
If the last question and answer alone are too long, the answer is cut at its end.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedpet.errors import ConfigError, DataError

__all__ = ["ASSISTANT", "ChatRenderer", "Turns"]

Turns = tuple[tuple[str, str], ...]  # (role, text)
ASSISTANT = "assistant"
_WORDS = ("x", "0", "?", "zq", "~")  # one of which stands where an answer was
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatRenderer:
    """Render conversations.

    Args:
        tokenizer: Of transformers, with a chat template.
        max_length: Tokens of a conversation, at most.
        source: The tokeniser's place, for messages.

    Raises:
        ConfigError: It has no template.
    """

    def __init__(self, tokenizer: Any, max_length: int, source: str) -> None:
        template = getattr(tokenizer, "chat_template", None)
        if not template:
            raise ConfigError(
                f"the tokeniser in {source!r} has no chat template, by which the turns of a "
                "conversation become one text: take a checkpoint made for chat, or put a "
                "chat_template.jinja beside the tokeniser."
            )
        self._tokenizer, self._most = tokenizer, max_length
        self._has_marks = isinstance(template, str) and bool(_MARKS.search(template))
        self._special = set(tokenizer.all_special_ids)
        encoded = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in _WORDS)
        self._words = [(word, set(ids)) for word, ids in zip(_WORDS, encoded, strict=True)]

    def encode(self, turns: Turns, row: int, where: str) -> tuple[list[int], list[int]]:
        """Return ids and marks, 1 of an answer's token.

        Args:
            turns: At least one answer; those after the last answer are left out.
            row: Counted from 0, for messages.
            where: The split, for messages.

        Raises:
            DataError: The template refuses the turns, or no token of an answer is left.
        """
        try:
            ids, marks = self._marked(self._fitting(_up_to_answer(turns)))
        except ConfigError:
            raise
        except Exception as error:  # jinja's, and what a template raises
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            raise DataError(
                f"the chat template takes no turns as those of row {row + 1} of {where}, roles "
                f"{', '.join(role for role, _ in turns)[:80]} ({reason}): mend or remove the row."
            ) from None
        ids, marks = ids[: self._most], marks[: self._most]
        if marks:
            marks[0] = 0  # nothing comes before it
        if not any(marks):
            raise DataError(
                f"row {row + 1} of {where} has nothing of its answer within data.max-length = "
                f"{self._most} tokens, since its last question is as long: raise it, or shorten or "
                "remove the row."
            )
        return ids, marks

    def _fitting(self, turns: Turns) -> Turns:
        """Drop the oldest exchanges of a conversation that is too long."""
        system = turns[:1] if turns[0][0] == "system" else ()
        rest = turns[len(system) :]
        starts = [
            index
            for index, (role, _) in enumerate(rest)
            if index == 0 or (role != ASSISTANT and rest[index - 1][0] == ASSISTANT)
        ]
        if len(starts) < 2 or len(self._ids(turns)) <= self._most:
            return turns
        kept = (*system, *rest[starts[-1] :])
        for start in reversed(starts[1:-1]):
            longer = (*system, *rest[start:])
            if len(self._ids(longer)) > self._most:
                break
            kept = longer
        return kept

    def _marked(self, turns: Turns) -> tuple[list[int], list[int]]:
        if self._has_marks:
            found = self._tokenizer.apply_chat_template(
                _messages(turns), return_dict=True, return_assistant_tokens_mask=True
            )
            ids, marks = list(found["input_ids"]), list(found["assistant_masks"])
            if any(marks):
                return ids, marks
        ids = self._ids(turns)
        marks = [0] * len(ids)
        word = self._word_beside(ids)
        for index, (role, text) in enumerate(turns):
            if role == ASSISTANT and text.strip():
                other = self._ids((*turns[:index], (role, word), *turns[index + 1 :]))
                start, stop = self._span(ids, other)
                marks[start:stop] = [1] * (stop - start)
        return ids, marks

    def _span(self, ids: list[int], other: list[int]) -> tuple[int, int]:
        """Return where two conversations part and meet again, and one on if that ends the turn."""
        start = _common(ids, other)
        stop = len(ids) - _common(ids[start:][::-1], other[start:][::-1])
        if stop < len(ids) and ids[stop] in self._special:
            stop += 1
        return start, stop

    def _word_beside(self, ids: list[int]) -> str:
        """Return a word none of whose tokens is in a conversation."""
        for word, tokens in self._words:
            if not tokens & set(ids):
                return word
        return self._words[-1][0]

    def _ids(self, turns: Turns) -> list[int]:
        text = self._tokenizer.apply_chat_template(_messages(turns), tokenize=False)
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def _messages(turns: Turns) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


def _up_to_answer(turns: Turns) -> Turns:
    """Leave out what comes after the last answer: there is nothing to learn from it."""
    last = max(index for index, (role, _) in enumerate(turns) if role == ASSISTANT)
    return turns[: last + 1]


def _common(ids: Sequence[int], other: Sequence[int]) -> int:
    """Count the tokens with which both begin."""
    length = min(len(ids), len(other))
    unlike = np.flatnonzero(np.asarray(ids[:length]) != np.asarray(other[:length]))
    return int(unlike[0]) if len(unlike) else length
