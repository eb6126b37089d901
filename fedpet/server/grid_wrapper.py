"""A Grid in front of another: everything is the other's but for what a subclass does itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid


class GridWrapper(Grid):
    """Passes everything on to `grid`."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the nodes."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Receive what has come."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send, and receive what comes in time."""
        return self._grid.send_and_receive(messages, timeout=timeout)

    def get_nodes(self) -> Iterable[Any]:
        """What Flower knows of its nodes."""
        return self._grid.get_nodes()

    def set_run(self, run: Any) -> None:
        """The run is the grid's."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """The grid's run."""
        return self._grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Deprecated in Flower: use `Message`."""
        return self._grid.create_message(*args, **kwargs)
