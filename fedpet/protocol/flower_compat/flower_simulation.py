"""Adjust Flower's simulation engine and Ray: workers that stay, prompt messages, the loopback."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from queue import Empty, Queue
from threading import Event
from typing import Any

from flwr.app import Message

from fedpet.protocol.flower_compat.replaced import replaced

__all__ = [
    "RESTARTS",
    "MessageEvents",
    "is_actor_alive",
    "mixed_into_pool",
    "prompt_messages",
    "quiet_flower",
    "ray_on_loopback",
    "raylet_of",
]

# Flower's pool of workers never replaces one: a worker that was killed, for memory say, takes every
# later message of its node with it. Ray replaces it and repeats the message where these options of
# its actors say so, and Flower hands its client_resources on as those. What comes out is the same,
# since a message holds all that decides its reply (law 6).
RESTARTS = {
    "max_restarts": -1,
    "max_task_retries": 3,  # of a message that kills its worker each time; then it is refused
}


LOOK_SECONDS = 0.1  # between looks for messages where no event came


@contextmanager
def quiet_flower() -> Iterator[None]:
    """Keep Flower's log to errors: fedpet prints progress and refusals itself."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning, module="flwr")
            yield
        logger.setLevel(level)
    except Exception:
        logger.setLevel(level)
        raise  # an interrupt keeps it off for longer, see `stoppable`


@contextmanager
def mixed_into_pool(mixin: type, workers: int) -> Iterator[None]:
    """Put a class in front of Flower's pool of workers, and wait for all workers at once.

    Flower waits for at most 32 of them, and for fewer on a machine of few cores.
    """
    from concurrent.futures import ThreadPoolExecutor
    from functools import partial

    from flwr.server.superlink.fleet.vce import vce_api
    from flwr.server.superlink.fleet.vce.backend import raybackend
    from flwr.simulation.ray_transport.ray_actor import BasicActorPool

    pool = type(mixin.__name__, (mixin, BasicActorPool), {})
    with (
        replaced(raybackend, BasicActorPool=partial(pool, workers=workers)),
        replaced(vce_api, ThreadPoolExecutor=partial(ThreadPoolExecutor, max_workers=workers)),
    ):
        yield


@dataclass(frozen=True)
class MessageEvents:
    """Events of a simulation's messages.

    Attributes:
        sent: The server has sent one.
        arrived: A reply lies ready for it.
    """

    sent: Event = field(default_factory=Event)
    arrived: Event = field(default_factory=Event)


@contextmanager
def prompt_messages(events: MessageEvents) -> Iterator[None]:
    """Let a simulation hand messages on when they come.

    Flower's own loops are these, and look for messages to nodes ten times a second.
    """
    from flwr.server.superlink.fleet.vce import vce_api

    def to_nodes(state: Any, queue: Queue[Message], nodes: Iterable[int], stopped: Event) -> None:
        while not stopped.is_set():
            events.sent.clear()
            found = True
            while found:  # one a node in turn
                found = False
                for node in nodes:
                    for message in state.get_message_ins(node_id=node, limit=1):
                        queue.put(message)
                        found = True
            events.sent.wait(LOOK_SECONDS)

    def to_server(state: Any, queue: Queue[Message], stopped: Event) -> None:
        while not stopped.is_set():
            with suppress(Empty):
                state.store_message_res(queue.get(timeout=1.0))
                events.arrived.set()

    with replaced(vce_api, add_messages_to_queue=to_nodes, put_message_into_state=to_server):
        yield


def is_actor_alive(actor: Any) -> bool:
    """Tell from Ray's books whether a worker runs: its public way needs the dashboard."""
    return _actor_books(actor).get("State") == "ALIVE"


def raylet_of(actor: Any) -> tuple[str, int] | None:
    """Return host and port of the raylet on a worker's machine; None where it has none yet."""
    import ray

    machine = _actor_books(actor).get("Address", {}).get("NodeID")
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if node["NodeID"] == machine:
            return node["NodeManagerAddress"], node["NodeManagerPort"]
    return None


def _actor_books(actor: Any) -> Mapping[str, Any]:
    from ray._private.state import actors

    books: Mapping[str, Any] = actors(actor._actor_id.hex())
    return books


@contextmanager
def ray_on_loopback() -> Iterator[None]:
    """Let a Ray that is started inside listen on 127.0.0.1 alone.

    It does so by itself where it is made for no cluster, as on macOS, and replaces that address by
    the machine's own elsewhere, even one that it is given.
    """
    from ray._private import ray_constants

    name, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    inherited = os.environ.get(name)
    os.environ[name] = "0"  # of the processes that it starts
    vars(ray_constants)["ENABLE_RAY_CLUSTER"] = False
    try:
        yield
    finally:
        vars(ray_constants)["ENABLE_RAY_CLUSTER"] = before
        os.environ.pop(name)
        if inherited is not None:
            os.environ[name] = inherited
