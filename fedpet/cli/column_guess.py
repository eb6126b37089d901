"""Guess the text, label and client columns of a data set from their names and values."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedpet.errors import InputError

__all__ = ["Columns", "guess_columns"]

# Names by convention, the likeliest first.
TEXTS = (
    "text",
    "sentence",
    "review",
    "comment",
    "content",
    "body",
    "message",
    "tweet",
    "utterance",
)
PAIRS = (
    *(("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2")),
    *(("text1", "text2"), ("text_a", "text_b"), ("question", "sentence"), ("question", "passage")),
)
LABELS: tuple[str, ...] = (
    "label",
    "labels",
    "class",
    "category",
    "target",
    "sentiment",
    "intent",
    "topic",
    "emotion",
)
LABELS += ("rating", "stars", "score", "grade", "y")
CLIENTS: tuple[str, ...] = (
    "client",
    "user",
    "author",
    "speaker",
    "writer",
    "patient",
    "subject",
    "customer",
)
CLIENTS += ("hospital", "site", "device", "account", "product", "film", "movie", "source", "region")
MAX_CLASSES = 200  # above this a column of names is no label by its values alone
WORDS_OF_A_TEXT = 3.0  # on average, of a text column found by its values


@dataclass(frozen=True)
class Columns:
    """The columns of an experiment.

    Attributes:
        texts: One column, or two for pairs of texts.
        label: The label column.
        client: The client column, "" where the data has none.
        is_regression: The label is a number and no class.
        rows_by_class: Number of rows of each class; empty for a regression.
        rows_by_client: Number of rows of each client.
        words: Words of a row that nineteen rows of twenty do not exceed.
    """

    texts: tuple[str, ...]
    label: str
    client: str
    is_regression: bool
    rows_by_class: Mapping[str, int]
    rows_by_client: Mapping[str, int]
    words: int


def guess_columns(
    values: Mapping[str, Sequence[Any]],
    *,
    texts: Sequence[str] = (),
    label: str = "",
    client: str = "",
) -> Columns:
    """Guess the columns that are not given.

    Args:
        values: Every column's values, by its name, in the order of the columns.
        texts: The text columns, where known.
        label: The label column, where known.
        client: The client column, where known.

    Raises:
        InputError: There is no such column, or none that can be a text or a label.
    """
    for name in (*texts, label, client):
        if name and name not in values:
            raise InputError(f"the data has no column {name!r}. It has {_listed(values)}.")
    taken = {*texts, label, client}
    texts = tuple(texts) or _texts(_without(values, taken))
    label = label or _label(_without(values, {*texts, client}))
    client = client or _client(_without(values, {*texts, label}))
    labels = [value for value in values[label] if value is not None and value != ""]
    is_regression = _is_regression(labels)
    classes = Counter() if is_regression else Counter(map(str, labels))
    if not is_regression and len(classes) < 2:
        raise InputError(
            f"the label column {label!r} has {len(classes)} class, and a classifier needs two: "
            "name another with --label-column."
        )
    lengths = sorted(
        sum(len(str(values[name][row]).split()) for name in texts)
        for row in range(len(values[label]))
    )
    clients = Counter(str(value) for value in values[client]) if client else Counter()
    return Columns(
        tuple(texts), label, client, is_regression, classes, clients,
        lengths[int(0.95 * (len(lengths) - 1))],
    )  # fmt: skip


def _texts(values: Mapping[str, Sequence[Any]]) -> tuple[str, ...]:
    names = {name.lower(): name for name in values}
    for first, second in PAIRS:
        if first in names and second in names:
            return names[first], names[second]
    words = {name: _mean_words(column) for name, column in values.items()}
    for known in TEXTS:
        if known in names and words[names[known]] > 0:
            return (names[known],)
    longest = max(words, key=lambda name: words[name], default="")
    if not longest or words[longest] < WORDS_OF_A_TEXT:
        raise InputError(
            f"none of the columns {_listed(values)} looks like text: name one with --text-column."
        )
    return (longest,)


def _label(values: Mapping[str, Sequence[Any]]) -> str:
    for name in _by_name(values, LABELS):
        return name
    found = {}
    for name, column in values.items():
        distinct, rows = len(set(map(str, column))), len(column)
        if 2 <= distinct <= min(MAX_CLASSES, max(2, rows // 8)) and _mean_words(column) < 4:
            found[name] = distinct
    if not found:
        raise InputError(
            f"none of the columns {_listed(values)} looks like a label, which has a few values "
            "that recur: name one with --label-column."
        )
    return min(found, key=lambda name: found[name])


def _client(values: Mapping[str, Sequence[Any]]) -> str:
    """The client column by its name; values alone do not tell a client from a topic."""
    for name in _by_name(values, CLIENTS):
        column = values[name]
        distinct = len(set(map(str, column)))
        is_full = all(value is not None and value != "" for value in column)
        if is_full and 2 <= distinct <= len(column) // 2:
            return name
    return ""


def _by_name(values: Mapping[str, Sequence[Any]], known: Iterable[str]) -> list[str]:
    """Columns with a known name, bare or with an ending such as "_id" or "_name"."""
    bare = {name: name.lower().replace("-", "_") for name in values}
    for ending in ("_id", "_name", "id"):
        bare = {name: text.removesuffix(ending) or text for name, text in bare.items()}
    return [name for word in known for name in values if bare[name] == word]


def _is_regression(labels: Sequence[Any]) -> bool:
    """True for numbers that are not all whole, or whole ones that hardly recur."""
    try:
        numbers = [float(value) for value in labels if not isinstance(value, bool)]
    except (TypeError, ValueError):
        return False
    if len(numbers) < len(labels) or not all(map(math.isfinite, numbers)):
        return False
    return not all(map(float.is_integer, numbers)) or len(set(numbers)) > max(20, len(numbers) // 4)


def _mean_words(column: Sequence[Any]) -> float:
    texts = [value for value in column if isinstance(value, str)]
    if len(texts) < len(column) / 2:
        return 0.0
    return sum(len(text.split()) for text in texts) / max(1, len(column))


def _without(values: Mapping[str, Sequence[Any]], names: set[str]) -> dict[str, Sequence[Any]]:
    return {name: column for name, column in values.items() if name not in names}


def _listed(values: Iterable[str]) -> str:
    return ", ".join(map(repr, values)) or "(none)"
