"""The size of a message is computed, and equals that of Flower's bytes."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Error, Message, RecordDict

from fedpet.protocol.flower_compat.flower_messages import CHUNK_BYTES, become_local_task, make_reply
from fedpet.protocol.request import flower_bytes, single_client_bytes, to_record, wire_bytes

SIZES = (0, 1, 9, 10, 127, 128, 999, 1000, 65_535, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1)


def noise(count: int) -> RecordDict:
    return to_record(np.random.default_rng(count).bytes(count))


@pytest.mark.parametrize("count", [*SIZES, 2 * CHUNK_BYTES, 11 * CHUNK_BYTES + 7])
def test_a_message_weighs_what_flower_serialises(count: int) -> None:
    become_local_task()
    request = Message(noise(count), dst_node_id=1 << 60, message_type="train.chunk")
    reply = make_reply(noise(count), node=3)
    for message in (request, reply):
        assert wire_bytes(message) == flower_bytes(message)
    extra = single_client_bytes(count, reply=True) - single_client_bytes(0, reply=True)
    assert extra == flower_bytes(reply) - flower_bytes(make_reply(noise(0), node=3))


def test_pieces_of_equal_bytes_weigh_as_often_as_they_are_counted() -> None:
    """Flower stores equal pieces once; a codec's bytes are never so, whatever is counted."""
    count = 3 * CHUNK_BYTES
    reply = make_reply(noise(count), node=3)
    alike = make_reply(to_record(bytes(count)), node=3)
    assert wire_bytes(alike) == wire_bytes(reply) == flower_bytes(reply) > flower_bytes(alike)


def test_what_is_no_message_of_ours_is_weighed_as_it_is() -> None:
    two = noise(5)
    two["other"] = noise(7)["fedpet"]
    for content in (Error(1, "a reason"), RecordDict(), two):
        message = make_reply(content, node=3)
        assert wire_bytes(message) == flower_bytes(message)


def test_weighing_leaves_nothing_in_a_message_that_is_sent() -> None:
    message = make_reply(noise(1000), node=3)
    before = set(vars(message.content["fedpet"]["bytes"]))
    wire_bytes(message)
    assert set(vars(message.content["fedpet"]["bytes"])) == before
