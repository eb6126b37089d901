"""Questions that are out, and the answers to them: each belongs to the node that was asked.

In:  messages to nodes.
Out: what comes back, with the asked node's id on it, whatever it says of itself (law 7); where it
     cannot be read at all, an error of that node's.

A reply is rebuilt by Flower from bytes that the node wrote, its sender, its kind and the number of
its question included; the SuperLink vouches for none of these. What is known is which node a
question was put to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import httpx
from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

from fedpet.protocol.flower_compat import make_reply, set_sender

AT_ONCE = 16  # answers pulled at most before they are handed on
UNREADABLE = 1001  # Flower's error codes below are its own


class _Asked(NamedTuple):
    node: int
    kind: str


class PendingMessages:
    """Sends and collects by a Grid."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._out: dict[str, _Asked] = {}
        self._at_once = AT_ONCE

    def __bool__(self) -> bool:
        """Whether an answer is awaited."""
        return bool(self._out)

    @property
    def nodes(self) -> set[int]:
        """Nodes whose answer is awaited."""
        return {asked.node for asked in self._out.values()}

    def forget(self) -> None:
        """Await nothing any more."""
        self._out.clear()

    def send(self, messages: Iterable[Message]) -> None:
        """Send one by one: a message may be made when it is taken, and be large."""
        for message in messages:
            asked = _Asked(message.metadata.dst_node_id, message.metadata.message_type)
            # Flower gives None for a message that it could not send: nobody will answer it.
            self._out |= {n: asked for n in self._grid.push_messages([message]) if n}

    def collect(self) -> Iterator[Message]:
        """The answers that have come by now."""
        waiting = list(self._out)
        while waiting:
            some, waiting = waiting[: self._at_once], waiting[self._at_once :]
            try:
                answers = list(self._grid.pull_messages(some))
            except (OSError, httpx.HTTPError):
                raise  # it is the server that is not reached
            except Exception as error:  # bytes of a node's, that Flower could not make sense of
                # It came with others that are lost now. From here on every answer comes alone.
                self._at_once = 1
                if len(some) == 1:
                    yield self._unreadable(some[0], type(error).__name__)
                else:
                    waiting = some + waiting
                continue
            for answer in answers:
                asked = self._out.pop(answer.metadata.reply_to_message_id, None)
                if asked is not None:
                    yield _of(asked, answer)

    def _unreadable(self, number: str, what: str) -> Message:
        asked = self._out.pop(number)
        return _error(asked, number, f"its reply cannot be read ({what}).")


def _of(asked: _Asked, answer: Message) -> Message:
    """The answer as one of the node that was asked, to what it was asked."""
    content = answer.content if answer.has_content() else None
    if not answer.has_error() and not isinstance(content, RecordDict):
        number = answer.metadata.reply_to_message_id
        return _error(asked, number, "its reply holds no records.")
    set_sender(answer, asked.node, asked.kind)
    return answer


def _error(asked: _Asked, number: str, reason: str) -> Message:
    error = Error(UNREADABLE, reason)
    return make_reply(error, node=asked.node, kind=asked.kind, asked=number)
