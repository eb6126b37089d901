"""A simulation's messages go on when they come: nobody waits for the next look."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Iterator
from queue import Queue
from typing import Any

import pytest
from flwr.app import Message

from fedpet.protocol.flower_compat import flower_simulation
from fedpet.protocol.flower_compat.flower_simulation import MessageEvents, prompt_messages
from fedpet.protocol.request import to_record
from fedpet.run.interrupts import Heeding
from fedpet.run.local_grid import LocalGrid
from fedpet.server.reply_stream import GridWrapper, PromptGrid, StreamingGrid

LONG, SOON = 60.0, 20.0  # seconds
vce_api = pytest.importorskip("flwr.server.superlink.fleet.vce.vce_api")


class State:
    """Messages for nodes, and their replies."""

    def __init__(self) -> None:
        self.waiting: dict[int, list[str]] = {1: [], 2: []}
        self.replies: list[Any] = []

    def get_message_ins(self, node_id: int, limit: int) -> list[str]:
        taken = self.waiting[node_id][:limit]
        del self.waiting[node_id][:limit]
        return taken

    def store_message_res(self, reply: Any) -> None:
        self.replies.append(reply)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> MessageEvents:
    monkeypatch.setattr(flower_simulation, "LOOK_SECONDS", LONG)
    return MessageEvents()


@pytest.fixture
def running(events: MessageEvents) -> Iterator[tuple[State, Queue[Any], Queue[Any]]]:
    """Flower's two loops, on a state of ours."""
    state, out, back, stopped = State(), Queue[Any](), Queue[Any](), threading.Event()
    with prompt_messages(events):
        loops = (
            (vce_api.add_messages_to_queue, (state, out, {1: 0, 2: 1}, stopped)),
            (vce_api.put_message_into_state, (state, back, stopped)),
        )
        threads = [threading.Thread(target=loop, args=given) for loop, given in loops]
        for thread in threads:
            thread.start()
        yield state, out, back
        stopped.set()
        events.sent.set()
        for thread in threads:
            thread.join()


def test_messages_reach_their_nodes_in_turn_as_soon_as_the_server_tells_of_them(
    events: MessageEvents, running: tuple[State, Queue[Any], Queue[Any]]
) -> None:
    state, out, _ = running
    for _ in range(2):  # the second time, the loop waits
        time.sleep(0.05)
        state.waiting = {1: ["a", "b"], 2: ["c"]}
        events.sent.set()
        assert [out.get(timeout=SOON) for _ in range(3)] == ["a", "c", "b"]


def test_the_server_is_woken_by_a_reply_that_is_stored(
    events: MessageEvents, running: tuple[State, Queue[Any], Queue[Any]]
) -> None:
    state, _, back = running
    front = StreamingGrid(Heeding(PromptGrid(LocalGrid({}), events)), lambda reply: [])
    threading.Timer(0.05, back.put, ["a reply"]).start()
    started = time.monotonic()
    front.wait(LONG)
    assert time.monotonic() - started < SOON
    assert state.replies == ["a reply"]
    started = time.monotonic()
    front.wait(0.05)  # nothing has come since
    assert time.monotonic() - started >= 0.04


def test_sending_tells_of_messages(events: MessageEvents) -> None:
    grid = PromptGrid(LocalGrid({1: lambda payload: payload}), events)
    list(grid.push_messages([Message(to_record(b"?"), dst_node_id=1, message_type="train")]))
    assert events.sent.is_set()


def test_a_grid_that_tells_nothing_is_waited_for_as_long_as_asked() -> None:
    started = time.monotonic()
    GridWrapper(LocalGrid({})).wait(0.1)
    assert time.monotonic() - started >= 0.09


def test_flowers_loops_take_what_ours_take_and_are_put_back(events: MessageEvents) -> None:
    names = ("add_messages_to_queue", "put_message_into_state")
    flowers = [getattr(vce_api, name) for name in names]
    with prompt_messages(events):
        for name, flower in zip(names, flowers, strict=True):
            ours = getattr(vce_api, name)
            assert ours is not flower
            assert len(inspect.signature(ours).parameters) == len(
                inspect.signature(flower).parameters
            )
    assert [getattr(vce_api, name) for name in names] == flowers
