"""Answer messages in this process: a Grid with the same client code, no Ray and no network.

For tests and debugging. Nodes answer one after another, in the order of the messages; what they
hold is a `Node` each, so plans and refusals behave as they do between machines.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Error, Message
from flwr.serverapp import Grid

from fedpet.client.node import Node
from fedpet.client.node_config import NodeConfig
from fedpet.protocol.flower_compat.flower_messages import become_local_task, set_message_id
from fedpet.protocol.request import from_record, to_record

CLIENT_RAISED = 2  # Flower's code for a ClientApp that raised


class LocalGrid(Grid):
    """Nodes as plain objects.

    Args:
        handlers: Node id -> what answers a message's bytes.
    """

    def __init__(self, handlers: dict[int, Callable[[bytes], bytes]]) -> None:
        self._handlers = handlers
        self._replies: dict[str, Message] = {}
        self._numbers = itertools.count()
        become_local_task()

    @classmethod
    def of(cls, settings: NodeConfig, num_nodes: int) -> LocalGrid:
        """Make a grid of nodes that all hold every client's rows."""
        return cls({number: Node(settings).answer for number in range(1, num_nodes + 1)})

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the nodes."""
        return list(self._handlers)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Answer at once; the reply waits to be pulled."""
        ids = []
        for message in messages:
            number = f"message-{next(self._numbers)}"
            set_message_id(message, number)
            self._replies[number] = self._answer(message)
            ids.append(number)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Hand out the replies to these messages."""
        return [self._replies.pop(number) for number in message_ids]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push and pull."""
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, message: Message) -> Message:
        try:
            answer = self._handlers[message.metadata.dst_node_id](from_record(message.content))
        except Exception as error:  # as a ClientApp that raises: the round goes on
            return Message(Error(CLIENT_RAISED, str(error)), reply_to=message)
        return Message(to_record(answer), reply_to=message)

    # What a Grid must have, and nothing here asks for.

    def set_run(self, run: Any) -> None:
        """Nothing: there is one run."""

    @property
    def run(self) -> Any:
        """There is no Run here."""
        return None

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Deprecated in Flower: use `Message`."""
        return Message(*args, **kwargs)

    def get_nodes(self) -> Iterable[Any]:
        """No more is known of a node than its id."""
        return []
