"""An answer is the asked node's, whatever its bytes say, and none ends the run (law 7)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import httpx
import numpy as np
import pytest
from flwr.app import Array, Message, RecordDict

from fedpet.errors import FrameError
from fedpet.protocol.request import from_record, to_record
from fedpet.run.local_grid import LocalGrid
from fedpet.server.pending_messages import PendingMessages

Spoil = Callable[[Message], Message]


class Hostile(LocalGrid):
    """Node 1 writes what it likes into its reply, or bytes at which Flower's reading fails."""

    def __init__(self, spoil: Spoil, nodes: int = 4) -> None:
        super().__init__({node: lambda payload: payload for node in range(nodes)})
        self._spoil = spoil

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        taken = []
        for number in message_ids:
            if number not in self._replies:
                continue  # lost with another one: as Flower's server, it has nothing more
            reply = self._replies.pop(number)
            is_hostile = reply.metadata.src_node_id == 1
            taken.append(self._spoil(reply) if is_hostile else reply)
        return taken


def collect(grid: LocalGrid) -> dict[int, Message]:
    mailbox = PendingMessages(grid)
    mailbox.send(
        Message(to_record(bytes([node])), dst_node_id=node, message_type="train")
        for node in grid.get_node_ids()
    )
    answers = list(mailbox.collect())
    assert len(answers) == len({answer.metadata.src_node_id for answer in answers})
    return {answer.metadata.src_node_id: answer for answer in answers}


def says(name: str, value: object) -> Spoil:
    def spoil(reply: Message) -> Message:
        reply.metadata.__dict__[f"_{name}"] = value
        return reply

    return spoil


@pytest.mark.parametrize(
    "spoil", [says("src_node_id", 3), says("message_type", "x" * 10**6), says("run_id", 99)]
)
def test_who_and_what_a_reply_says_to_be_is_not_believed(spoil: Spoil) -> None:
    answers = collect(Hostile(spoil))
    assert sorted(answers) == [0, 1, 2, 3]
    for node, answer in answers.items():
        assert from_record(answer.content) == bytes([node])
        assert answer.metadata.message_type == "train"


def test_an_answer_to_a_question_that_was_not_asked_is_dropped() -> None:
    assert sorted(collect(Hostile(says("reply_to_message_id", "x")))) == [0, 2, 3]


def test_a_second_answer_to_one_question_is_dropped() -> None:
    assert sorted(collect(Hostile(says("reply_to_message_id", "message-0")))) == [0, 2, 3]


@pytest.mark.parametrize("content", [None, Array(np.zeros(3, dtype=np.uint8))])
def test_a_reply_that_holds_something_else_than_records_is_an_error_of_its_node(
    content: object,
) -> None:
    def other(reply: Message) -> Message:
        reply.__dict__["_content"] = content
        return reply

    answer = collect(Hostile(other))[1]
    assert answer.has_error()
    assert "holds no records" in answer.error.reason


@pytest.mark.parametrize("error", [IndexError("x"), ValueError("x"), RuntimeError("x")])
def test_a_reply_that_flower_cannot_read_is_an_error_of_its_node(error: Exception) -> None:
    def unreadable(reply: Message) -> Message:
        raise error

    grid = Hostile(unreadable)
    mailbox = PendingMessages(grid)
    for _ in range(2):  # what came with it the first time is lost: Flower has let go of it
        mailbox.hand_over(PendingMessages(grid))
        mailbox.send(
            Message(to_record(b"?"), dst_node_id=node, message_type="train") for node in range(4)
        )
        answers = {answer.metadata.src_node_id: answer for answer in mailbox.collect()}
    assert sorted(answers) == [0, 1, 2, 3]
    assert answers[1].has_error()
    assert not any(answers[node].has_error() for node in (0, 2, 3))


def test_a_server_that_is_not_reached_is_no_node_s_fault() -> None:
    def away(reply: Message) -> Message:
        raise httpx.ConnectError("away")

    with pytest.raises(httpx.ConnectError):
        collect(Hostile(away))


@pytest.mark.parametrize("content", [RecordDict(), Array(np.zeros(3, dtype=np.uint8)), None])
def test_what_is_no_message_of_ours_is_refused(content: object) -> None:
    with pytest.raises(FrameError, match="holds one array"):
        from_record(content)  # type: ignore[arg-type]
