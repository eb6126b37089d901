"""Make and mark Flower's messages where no process of Flower's does.

CHUNK_BYTES: Flower splits arrays at this size, and each chunk has a header of its own to count.
InflatableObject: the tree of parts that a message is sent as, whose bytes the ledger counts.
"""

from __future__ import annotations

import time

from flwr.app import Error, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE as CHUNK_BYTES
from flwr.common.constant import ErrorCode
from flwr.supercore.inflatable.inflatable_object import InflatableObject
from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    "CHUNK_BYTES",
    "InflatableObject",
    "become_local_task",
    "client_app_raised",
    "make_message",
    "make_reply",
    "set_message_id",
    "set_sender",
]


def client_app_raised(error: Error) -> bool:
    """Tell if a node's ClientApp raised, and not that no reply came of it."""
    return bool(error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION)


def make_reply(
    content: RecordDict | Error, *, node: int, kind: str = "train", asked: str = "asked"
) -> Message:
    """Make a message as a node's, which Flower lets only a node's own process do.

    Args:
        content: Its records, or what went wrong.
        node: Id of the node that counts as its sender.
        kind: Message type.
        asked: Id of the message that it answers.
    """
    metadata = Metadata(
        run_id=0,
        message_id="",
        src_node_id=node,
        dst_node_id=0,
        reply_to_message_id=asked,
        group_id="",
        created_at=time.time(),
        ttl=1.0,
        message_type=kind,
    )
    if isinstance(content, Error):
        return make_message(metadata=metadata, error=content)
    return make_message(metadata=metadata, content=content)


def set_sender(message: Message, node: int, kind: str) -> None:
    """Write the sender that the server knows over the one that the node wrote (law 7)."""
    message.metadata.__dict__["_src_node_id"] = node
    message.metadata.__dict__["_message_type"] = kind


def set_message_id(message: Message, number: str) -> None:
    """Number a message, as a SuperLink does, where none is there."""
    message.metadata.__dict__["_message_id"] = number


def become_local_task() -> None:
    """Take the ids of a task, without which Flower makes no message outside of its processes."""
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
