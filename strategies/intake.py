"""Replies are taken as they come, so that the server never holds those of a whole round.

In:  Flower's Grid, which gives a round's replies in one list.
Out: the same Grid, whose replies go to `take` one by one while others are still awaited; and the
     `Shelf` on which what has to wait for the round's end does so, on disk past a few megabytes.
"""

from __future__ import annotations

import math
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable

from flwr.app import Message
from flwr.serverapp import Grid

from .in_front import InFront

AT_ONCE = 16  # replies pulled at most before they are taken
SHORTEST_PAUSE, LONGEST_PAUSE = 0.1, 3.0  # seconds
IN_MEMORY_BYTES = 8 << 20


class Intake(InFront):
    """A Grid that hands each reply to `take` when it comes."""

    def __init__(self, grid: Grid, take: Callable[[Message], None]) -> None:
        super().__init__(grid)
        self._take = take

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send one by one; take what comes in time. Nothing is left to return."""
        limit = math.inf if timeout is None else time.monotonic() + timeout
        waiting: list[str] = []
        for message in messages:
            # Flower gives None for a message that it could not send: nobody will answer it.
            waiting += [number for number in self._grid.push_messages([message]) if number]
        while waiting:
            answered, asked_at = set(), time.monotonic()
            for start in range(0, len(waiting), AT_ONCE):
                for reply in self._grid.pull_messages(waiting[start : start + AT_ONCE]):
                    answered.add(reply.metadata.reply_to_message_id)
                    self._take(reply)
            waiting = [number for number in waiting if number not in answered]
            if not waiting or time.monotonic() > limit:
                break
            # Where asking in vain costs time, as over a network, it is not done all the time.
            spent = 0.0 if answered else time.monotonic() - asked_at
            time.sleep(min(max(SHORTEST_PAUSE, 4 * spent), LONGEST_PAUSE))
        return []


class Shelf:
    """Keeps bytes until they are asked for, once: in memory while they are few, then on disk."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES)  # noqa: SIM115
        self._end = 0
        self.close = weakref.finalize(self, self._file.close)  # of itself where a round is cut off

    def put(self, data: bytes | memoryview) -> tuple[int, int]:
        """Keep `data`; gives where, for `get`."""
        self._file.seek(self._end)
        self._file.write(data)
        place = (self._end, len(data))
        self._end += len(data)
        return place

    def get(self, place: tuple[int, int]) -> bytes:
        """What was put there."""
        start, size = place
        self._file.seek(start)
        return self._file.read(size)
