"""Replies of a deployment are bounded before they are pulled."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.superlink.grid.http_grid import HttpGrid

from fedpet.protocol.flower_compat.flower_fleet import bound_replies
from fedpet.protocol.flower_compat.flower_messages import CHUNK_BYTES


class Client:
    """Flower's client of the Runtime API, with one reply of so many objects."""

    def __init__(self, objects: int, size: int) -> None:
        self._objects, self._size = objects, size
        self.pulled: list[str] = []

    def PullMessages(self, request: Any) -> PullAppMessagesResponse:
        leaves = [ObjectTree(object_id=f"leaf {n}") for n in range(self._objects - 1)]
        big = ObjectTree(object_id="root", children=leaves)
        small = ObjectTree(object_id="other", children=[ObjectTree(object_id="its leaf")])
        return PullAppMessagesResponse(message_object_trees=[big, small])

    def PullObject(self, request: Any) -> PullObjectResponse:
        self.pulled.append(request.object_id)
        return PullObjectResponse(
            object_found=True, object_available=True, object_content=bytes(self._size)
        )


def pull(client: Client, most_bytes: int) -> tuple[list[str], list[str]]:
    """Pull all that the bounded client names; what was found, and what was not."""
    grid = HttpGrid(token="t")
    vars(grid)["_client"] = client
    for _ in range(2):  # once for the rounds of a search, once for training's
        bound_replies(grid, most_bytes)
    bounded = grid._runtime_client
    waiting = list(bounded.PullMessages(None).message_object_trees)
    found: list[str] = []
    lost: list[str] = []
    while waiting:
        tree = waiting.pop(0)
        waiting += tree.children
        there = bounded.PullObject(SimpleNamespace(object_id=tree.object_id)).object_found
        (found if there else lost).append(tree.object_id)
    return found, lost


def test_a_reply_of_too_many_objects_is_not_pulled_and_the_one_beside_it_is() -> None:
    client = Client(objects=64, size=10)
    assert pull(client, CHUNK_BYTES) == (["other", "its leaf"], ["root"])
    assert client.pulled == ["other", "its leaf"]


def test_a_reply_of_too_many_bytes_is_broken_off() -> None:
    client = Client(objects=9, size=CHUNK_BYTES)
    _, lost = pull(client, 3 * CHUNK_BYTES)
    assert lost == [f"leaf {n}" for n in range(3, 8)]


@pytest.mark.parametrize("objects", [1, 5, 9])
def test_a_reply_within_the_bound_comes_whole(objects: int) -> None:
    found, lost = pull(Client(objects=objects, size=100), CHUNK_BYTES)
    assert (len(found), lost) == (objects + 2, [])


def test_another_grid_is_left_as_it_is() -> None:
    bound_replies(object(), 1)
