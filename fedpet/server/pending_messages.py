"""Track pending messages and match replies to the nodes they were sent to.

In:  messages to nodes.
Out: their replies, each with the id of the node that the message went to (law 7); an error in that
     node's name where a reply cannot be read.

Flower rebuilds a reply from bytes that the node wrote, its sender, its type and the id of the
message included, and the SuperLink vouches for none of these. The server knows only the node that
each message went to.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import httpx
from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

from fedpet.protocol.flower_compat.flower_messages import make_reply, set_message_id, set_sender

AT_ONCE = 16  # replies pulled at most before they are handed on
UNREADABLE, RESTARTED = 1001, 1002  # Flower's error codes below are its own


class _Asked(NamedTuple):
    node: int
    kind: str
    sent: float  # seconds since the epoch


class PendingMessages:
    """Send messages by a Grid, and collect their replies."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._out: dict[str, _Asked] = {}
        self._at_once = AT_ONCE

    def __bool__(self) -> bool:
        """Tell if a reply is awaited."""
        return bool(self._out)

    @property
    def nodes(self) -> set[int]:
        """Nodes whose reply is awaited."""
        return {asked.node for asked in self._out.values()}

    def hand_over(self, late: PendingMessages) -> None:
        """Leave it to another to await these replies."""
        late._out |= self._out
        self._out.clear()

    def send(self, messages: Iterable[Message]) -> None:
        """Send one by one: a message may be large, and made when it is iterated over."""
        for message in messages:
            to = message.metadata
            asked = _Asked(to.dst_node_id, to.message_type, time.time())
            # Flower gives None for a message that it could not send: nobody will answer it.
            for number in filter(None, self._grid.push_messages([message])):
                self._out[number] = asked
                set_message_id(message, number)

    def collect(self) -> Iterator[Message]:
        """Yield the replies that have come by now."""
        waiting = list(self._out)
        while waiting:
            some, waiting = waiting[: self._at_once], waiting[self._at_once :]
            try:
                answers = list(self._grid.pull_messages(some))
            except (OSError, httpx.HTTPError):
                raise  # the server is not reached
            except Exception as error:  # bytes of a node that Flower could not decode
                # It came with others, which are lost now: from here on, pull one at a time.
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

    def lost(self, activated: Mapping[int, float]) -> Iterator[Message]:
        """Yield an error for each message that is from before its node's last start, and forget it.

        Args:
            activated: Node -> when its process was last activated, seconds since the epoch.
        """
        for number, asked in list(self._out.items()):
            if asked.sent < activated.get(asked.node, 0.0):
                del self._out[number]
                reason = "it was started again, and what it did before is lost."
                yield _error(asked, number, reason, RESTARTED)

    def _unreadable(self, number: str, what: str) -> Message:
        asked = self._out.pop(number)
        return _error(asked, number, f"its reply cannot be read ({what}).")


def _of(asked: _Asked, answer: Message) -> Message:
    """Return a reply with the node and type of the message that it answers."""
    content = answer.content if answer.has_content() else None
    if not answer.has_error() and not isinstance(content, RecordDict):
        number = answer.metadata.reply_to_message_id
        return _error(asked, number, "its reply holds no records.")
    set_sender(answer, asked.node, asked.kind)
    return answer


def _error(asked: _Asked, number: str, reason: str, code: int = UNREADABLE) -> Message:
    error = Error(code, reason)
    return make_reply(error, node=asked.node, kind=asked.kind, asked=number)
