"""Stream a round's replies, so that the server never holds all of them in memory.

In:  Flower's Grid, which returns a round's replies in one list.
Out: the same Grid, which hands each reply to `take` while others are still awaited; a simulation's
     Grid, which is woken by them; and `SpooledPayloads`, where payloads wait for their turn, on
     disk past a few megabytes.
"""

from __future__ import annotations

import math
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable
from datetime import datetime
from itertools import chain
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedpet.errors import RunError
from fedpet.protocol.flower_compat.flower_simulation import MessageEvents
from fedpet.server.pending_messages import PendingMessages

SHORTEST_PAUSE, LONGEST_PAUSE = 0.05, 3.0  # seconds
LOOK_SECONDS = 5.0  # from one look for nodes that were started again to the next
# A node that was started again may get the message that it was sent before, or not: Flower does not
# say. So long it has to answer, or as long as the round's slowest reply took.
LEAST_GRACE = 60.0
IN_MEMORY_BYTES = 8 << 20


class GridWrapper(Grid):
    """Wrap another Grid and delegate every call to it."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the nodes."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; return their ids."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that have come."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages; return the replies that come in time."""
        return self._grid.send_and_receive(messages, timeout=timeout)

    def wait(self, seconds: float) -> None:
        """Wait for replies, `seconds` at most: so long where the grid does not tell of them."""
        wait = self._grid.wait if isinstance(self._grid, GridWrapper) else time.sleep
        wait(seconds)

    def get_nodes(self) -> Iterable[Any]:
        """Return what Flower knows of its nodes."""
        return self._grid.get_nodes()

    def set_run(self, run: Any) -> None:
        """Hand the run on to the grid."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """Run of the grid."""
        return self._grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Make a message; deprecated in Flower, for `Message`."""
        return self._grid.create_message(*args, **kwargs)


class PromptGrid(GridWrapper):
    """Tell a simulation of messages that are sent, and wake when it tells of a reply.

    Args:
        grid: The simulation's.
        events: What both tell each other.
    """

    def __init__(self, grid: Grid, events: MessageEvents) -> None:
        super().__init__(grid)
        self._events = events

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; return their ids."""
        numbers = super().push_messages(messages)
        self._events.sent.set()
        return numbers

    def wait(self, seconds: float) -> None:
        """Wait until a reply has come since the last call, `seconds` at most."""
        self._events.arrived.wait(seconds)
        self._events.arrived.clear()


class StreamingGrid(GridWrapper):
    """Hand each reply to `take` when it comes, and send the messages that it gives as it goes.

    A message to a node whose process was started again is answered by an error, once its grace is
    over: Flower alone lets a round wait for it until the round's deadline.

    Args:
        grid: Reaches the nodes.
        take: Reads a reply; returns the messages that follow it.
        is_over: Tells if a round ends before its deadline.
    """

    def __init__(
        self,
        grid: Grid,
        take: Callable[[Message], Iterable[Message]],
        is_over: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(grid)
        self._mailbox, self._late = PendingMessages(grid), PendingMessages(grid)
        self._take = take
        self._is_over = is_over

    def busy_nodes(self) -> set[int]:
        """Return the nodes that have not answered a message of a round before; what comes is lost.

        Between rounds only: in a round it would take the round's replies.
        """
        self._mailbox.hand_over(self._late)
        for _ in self._late.collect():
            pass
        return self._late.nodes

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send one by one and take the replies that come in time; return none."""
        limit = math.inf if timeout is None else time.monotonic() + timeout
        mailbox = self._mailbox
        rest = iter(messages)
        if (first := next(rest, None)) is None:  # a round's evaluation, which no client does
            return []
        mailbox.hand_over(self._late)  # a late reply of the round before is not awaited
        mailbox.send(chain([first], rest))
        began = looked = time.monotonic()
        slowest = 0.0
        while mailbox:
            taken, asked_at = 0, time.monotonic()
            for reply in mailbox.collect():
                taken += 1
                slowest = time.monotonic() - began
                mailbox.send(self._take(reply))
            if not mailbox or time.monotonic() > limit or self._is_over():
                break
            # Where an empty pull takes time, as over a network, pull less often.
            spent = 0.0 if taken else time.monotonic() - asked_at
            self.wait(min(max(SHORTEST_PAUSE, 4 * spent), LONGEST_PAUSE))
            if time.monotonic() - looked > LOOK_SECONDS:
                looked = time.monotonic()
                for error in mailbox.lost(self._activated(max(LEAST_GRACE, slowest))):
                    mailbox.send(self._take(error))
        return []

    def _activated(self, grace: float) -> dict[int, float]:
        """Return when each node was last activated, of those whose grace is over."""
        found = {}
        for node in self.get_nodes():
            if node.last_activated_at:
                when = datetime.fromisoformat(node.last_activated_at).timestamp()
                if time.time() - when > grace:
                    found[node.node_id] = when
        return found


class SpooledPayloads:
    """Keep payloads for later: in memory while they are few, then on disk."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES)  # noqa: SIM115
        self._end = 0
        self.close = weakref.finalize(self, self._file.close)  # of itself where a round is cut off

    def put(self, data: bytes | memoryview) -> tuple[int, int]:
        """Write `data`; return its place, for `get`.

        Raises:
            RunError: The disk is full.
        """
        try:
            self._file.seek(self._end)
            self._file.write(data)
        except OSError as error:
            raise RunError(
                f"a round's replies wait in {tempfile.gettempdir()!r}, which takes no more: "
                f"{error.strerror or error}. Make room, or set TMPDIR to another folder."
            ) from None
        place = (self._end, len(data))
        self._end += len(data)
        return place

    def clear(self) -> None:
        """Let go of everything, on disk as well."""
        self._file.seek(0)
        self._file.truncate()
        self._end = 0

    def get(self, place: tuple[int, int]) -> bytes:
        """Read the bytes at a place."""
        start, size = place
        self._file.seek(start)
        return self._file.read(size)
