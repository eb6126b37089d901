"""Read the two-person chats of the package chitchat-dataset as rows of messages with a client.

A row is a person's reply, with the turn before it or the three before it; the client is the person
who answers. The reply's role is "assistant" and the turns take the roles in turn, so that a row
begins with the other person's, as chat templates ask. What somebody wrote in a row, in several
messages, is one turn, its messages joined by the end of a line.

People are known by pseudonyms, and chats by ids; hashes of both decide the split:

    people       replies of two tenths of the people
    validation   replies of one tenth of the people, for tuning
    replies      replies of the others, in a tenth of the chats that they have with each other
    train        their replies in all other chats that they have with each other

Left out of all are replies to a turn that alone would fill what a row may hold, 3 % of them: of
more than `LONGEST_QUESTION` bytes, where what makes a token of its own counts as four: a digit, a
sign, the end of a line, and a letter of a word of more than `LONGEST_WORD`, which is no word.

No word of a person of `people` or `validation`, and none of a chat of `replies`, stands in a row of
`train`, in its context neither. What people here say of themselves may be personal: reports show
few rows, and none of this is uploaded.

Source: the Chit-Chat Challenge of Brigham Young University, 2018; Myers, Etchart and Fulda,
"Conversational Scaffolding", 2020. MIT licence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fedpet.data.column import Column
from fedpet.data.source import Source, check_split, hash_file
from fedpet.data.split_table import Piece, Table
from fedpet.errors import DataError

__all__ = ["CHATS_FILE", "Chats"]

CHATS_FILE = "chitchat_dataset/dataset.json"
SPLITS = ("train", "validation", "people", "replies")
_PEOPLE = {0: "people", 1: "people", 2: "validation"}  # by a digit of their hash
LONGEST_QUESTION = 320  # about 75 tokens
LONGEST_WORD = 25
_FORMAT = 2  # raise it when the same file gives other rows: tokenised ones lie in a cache
_APART = "in a chat with a person who is held out"
_LONG = "an answer to a long turn"
_MOST_TURNS = 3  # before the reply; or 1, where there are not as many


class _Turn(NamedTuple):
    person: str
    text: str


@dataclass
class Chats(Source):
    """Replies in two-person chats: columns messages, text (the reply alone), client."""

    path: Path
    description: str = "the bundled chats"
    _tables: dict[str, Table] = field(default_factory=dict)

    def identity(self, split: str) -> dict[str, Any]:
        return {"chats": split, "format": _FORMAT, "sha256": hash_file(self.path)}

    def check(self, split: str) -> None:
        check_split(split, SPLITS, self.description)

    def read(self, split: str) -> Table:
        self.check(split)
        self._tables = self._tables or self._read_all()
        return self._tables[split]

    def _read_all(self) -> dict[str, Table]:
        try:
            chats = json.loads(self.path.read_text(encoding="utf-8"))
            rows = [row for name, chat in chats.items() for row in _rows(name, chat["messages"])]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{self.description}, file {self.path.name!r}, cannot be read "
                f"({type(error).__name__}): install its package anew."
            ) from None
        tables = {}
        for split in SPLITS:
            own = [(messages, client) for part, messages, client in rows if part == split]
            columns = {
                "messages": [messages for messages, _ in own],
                "text": [messages[-1]["content"] for messages, _ in own],
                "client": [client for _, client in own],
            }
            left_out = {_LONG: sum(part == f"{split}, {_LONG}" for part, _, _ in rows)}
            if split == "train":
                left_out[_APART] = sum(part == _APART for part, _, _ in rows)
            piece = Piece.of_columns({name: Column(values) for name, values in columns.items()})
            tables[split] = Table([piece], {why: count for why, count in left_out.items() if count})
        return tables


def _rows(chat: str, messages: Sequence[Any]) -> Iterator[tuple[str, list[dict[str, str]], str]]:
    """Yield (split, messages, client) of each reply in a chat; of one left out the reason."""
    turns = _turns(messages)
    others = {_person_split(turn.person) for turn in turns} - {"train"}
    shared = _APART if others else "replies" if _digit(chat) == 0 else "train"
    for index in range(1, len(turns)):
        before = _MOST_TURNS if index >= _MOST_TURNS else 1
        own = turns[index - before : index + 1]
        row = [
            {"role": "assistant" if (before - place) % 2 == 0 else "user", "content": turn.text}
            for place, turn in enumerate(own)
        ]
        split = _person_split(turns[index].person)
        split = shared if split == "train" else split
        if split in SPLITS and _length(turns[index - 1].text) > LONGEST_QUESTION:
            split = f"{split}, {_LONG}"
        yield split, row, turns[index].person


def _turns(messages: Sequence[Any]) -> list[_Turn]:
    """Join what one person wrote in a row; messages of blanks are none."""
    turns: list[_Turn] = []
    for message in (message for turn in messages for message in turn):
        person, text = str(message["sender"]), str(message["text"]).strip()
        if not text:
            continue
        if turns and turns[-1].person == person:
            turns[-1] = _Turn(person, f"{turns[-1].text}\n{text}")
        else:
            turns.append(_Turn(person, text))
    return turns


def _length(text: str) -> int:
    """Reckon a text's tokens, times four."""
    signs = sum(not (letter.isalpha() or letter == " ") for letter in text)
    for word in text.split():
        signs += sum(map(str.isalpha, word)) if len(word) > LONGEST_WORD else 0
    return len(text.encode()) + 3 * signs


def _person_split(person: str) -> str:
    return _PEOPLE.get(_digit(person), "train")


def _digit(name: str) -> int:
    """Return a digit of a name: the first byte of its SHA-256, modulo ten."""
    return hashlib.sha256(name.encode()).digest()[0] % 10
