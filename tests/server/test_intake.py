"""Replies are taken as they come, and what waits for the round's end lies on disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from flwr.proto.node_pb2 import NodeInfo
from hypothesis import given
from hypothesis import strategies as st

from fedpet.protocol.request import from_record, to_record
from fedpet.run.local_grid import LocalGrid
from fedpet.server import reply_stream
from fedpet.server.pending_messages import AT_ONCE, RESTARTED
from fedpet.server.reply_stream import SpooledPayloads, StreamingGrid


class Slow(LocalGrid):
    """Gives no more than `at_once` replies a time, the last question's first."""

    def __init__(self, nodes: int, at_once: int) -> None:
        super().__init__({node: lambda payload: payload[::-1] for node in range(nodes)})
        self.at_once = at_once
        self.pulled = 0

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        there = [number for number in message_ids if number in self._replies]
        replies = list(super().pull_messages(there[::-1][: self.at_once]))
        self.pulled = max(self.pulled, len(replies))
        return replies


def questions(count: int) -> Iterable[Message]:
    return (
        Message(to_record(f"to {n}".encode()), dst_node_id=n, message_type="train")
        for n in range(count)
    )


def taking(into: list[Any], what: Callable[[Message], Any] = lambda reply: reply) -> Any:
    """Notes something of each reply, and has nothing to send in return."""

    def take(reply: Message) -> list[Message]:
        into.append(what(reply))
        return []

    return take


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_every_reply_is_taken_once_however_they_come(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reply_stream, "SHORTEST_PAUSE", 0.0)
    grid, taken = Slow(40, at_once), []
    front = StreamingGrid(grid, taking(taken, lambda reply: from_record(reply.content)))
    assert not list(front.send_and_receive(questions(40)))
    assert sorted(taken) == sorted(f"to {n}".encode()[::-1] for n in range(40))
    assert grid.pulled <= AT_ONCE


def test_a_reply_is_taken_while_others_are_awaited() -> None:
    class Late(Slow):
        pulls = 0

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            self.pulls += 1
            return super().pull_messages(message_ids)

    grid = Late(2, 1)
    at = []
    StreamingGrid(grid, taking(at, lambda reply: grid.pulls)).send_and_receive(questions(2))
    assert at == [1, 2]


def test_what_is_given_in_return_is_sent_before_the_others_have_answered() -> None:
    class Slower(Slow):
        """The first question is answered after everything else."""

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            there = list(message_ids)
            return super().pull_messages([n for n in there if n != "message-0"] or there)

    taken: list[bytes] = []

    def take(reply: Message) -> list[Message]:
        taken.append(from_record(reply.content))
        again = Message(to_record(b"once more"), dst_node_id=1, message_type="train")
        return [again] if taken == [b"1 ot"] else []

    StreamingGrid(Slower(2, 1), take).send_and_receive(questions(2))
    assert taken == [b"1 ot", b"erom ecno", b"0 ot"]


def test_who_does_not_answer_in_time_is_left() -> None:
    class Deaf(Slow):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            return super().pull_messages([n for n in message_ids if n != "message-1"])

    taken: list[Message] = []
    started = time.monotonic()
    StreamingGrid(Deaf(3, 9), taking(taken)).send_and_receive(questions(3), timeout=0.3)
    assert len(taken) == 2
    assert 0.3 <= time.monotonic() - started < 5


def test_a_message_from_before_a_node_s_last_start_is_an_error_once_its_grace_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A message that was sent after the start is awaited, as is any within the grace."""
    monkeypatch.setattr(reply_stream, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(reply_stream, "LEAST_GRACE", 0.2)
    begun = datetime.now(UTC)

    class Restarting(Slow):
        """Node 1 starts again when it has been sent its message, node 2 had before."""

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            return super().pull_messages([n for n in message_ids if n == "message-0"])

        def get_nodes(self) -> Iterable[NodeInfo]:
            starts = {1: begun + timedelta(seconds=0.1), 2: begun - timedelta(seconds=9)}
            for node, start in starts.items():
                yield NodeInfo(node_id=node, last_activated_at=start.isoformat())

    taken: list[Message] = []
    StreamingGrid(Restarting(3, 9), taking(taken)).send_and_receive(questions(3), timeout=0.8)
    answer, error = taken
    assert answer.has_content()
    assert (error.metadata.src_node_id, error.error.code) == (1, RESTARTED)
    assert datetime.now(UTC) - begun > timedelta(seconds=0.3)


def test_a_message_that_flower_could_not_send_is_not_awaited() -> None:
    class Refusing(Slow):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            numbers = list(super().push_messages(messages))
            return [None if n == "message-0" else n for n in numbers]  # type: ignore[misc]

    taken: list[Message] = []
    StreamingGrid(Refusing(3, 9), taking(taken)).send_and_receive(questions(3))
    assert len(taken) == 2


@given(pieces=st.lists(st.binary(max_size=64), max_size=20), order=st.randoms())
def test_a_shelf_gives_back_what_was_put_in_any_order(pieces: list[bytes], order: object) -> None:
    shelf = SpooledPayloads()
    places = [(shelf.put(memoryview(piece)), piece) for piece in pieces]
    order.shuffle(places)  # type: ignore[attr-defined]
    assert all(shelf.get(place) == piece for place, piece in places)
    shelf.close()


def test_past_a_few_megabytes_a_shelf_lies_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reply_stream, "IN_MEMORY_BYTES", 100)
    shelf = SpooledPayloads()
    first = shelf.put(bytes(90))
    assert not shelf._file._rolled  # type: ignore[attr-defined]
    second = shelf.put(b"x" * 90)
    assert shelf._file._rolled  # type: ignore[attr-defined]
    assert (shelf.get(first), shelf.get(second)) == (bytes(90), b"x" * 90)
