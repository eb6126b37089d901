"""Pool Ray's workers, so that a round goes on when a machine of the cluster dies.

Ray starts a worker that died again, and repeats its message, where a machine has room for it. Where
none has, the worker waits for room, and its message goes to another one; a machine that comes back
brings its workers back into the pool. Results are the same: a message holds all that decides its
reply (law 6).
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from flwr.app import Context, Message

from fedpet.errors import RunError
from fedpet.protocol.flower_compat.flower_simulation import is_actor_alive, raylet_of

__all__ = ["WorkerPool"]

LOG = logging.getLogger("fedpet")
LOOK_SECONDS = 2.0  # between looks at a worker that has not answered
HOMELESS_SECONDS = 20.0  # after which a worker that is not started again counts as without room
CONNECT_SECONDS = 5.0
NO_WORKER_SECONDS = 600.0  # after which a message is refused because no worker is left

Job = tuple[Any, Message, str, Context]  # app, message, number of the node, its context


@dataclass(eq=False)
class Errand:
    """A message on its way to a worker, whichever that comes to be."""

    actor_fn: Callable[..., Any]
    job: Job


class WorkerPool:
    """Hand messages to workers, and on to others where a worker is lost with its machine.

    Stands in front of Flower's pool, which starts the workers (`mixed_into_pool`).

    Args:
        workers: The most workers to start; a cluster may have room for more.
        options: Of Flower's pool.
    """

    pool: list[Any]  # workers without a message
    actors_capacity: int

    def __init__(self, *, workers: int, **options: Any) -> None:
        super().__init__(**options)
        self.actors_capacity = min(self.actors_capacity, workers)
        self._lock = threading.Lock()
        self._away: list[Any] = []  # workers that wait for a machine with room
        self._machines: dict[Any, tuple[str, int]] = {}  # worker -> where its raylet listens

    def submit(self, actor_fn: Any, job: Job) -> Errand:
        """Note a message; `fetch_result_and_return_actor_to_pool` sends it."""
        return Errand(actor_fn, job)

    def fetch_result_and_return_actor_to_pool(self, future: Errand) -> tuple[Message, Context]:
        """Send a message to a worker and return its reply and context.

        Raises:
            RunError: There is no worker for a long time.
            RayError: A worker died each time that the message was repeated, or the app failed.
        """
        while True:
            actor = self._take()
            if actor not in self._machines and (machine := raylet_of(actor)):
                self._machines[actor] = machine
            answer, home = future.actor_fn(actor, *future.job), self._away
            try:
                if _came(answer, actor):
                    _, reply, context = ray.get(answer)
                    home = self.pool
                    return reply, context
                with contextlib.suppress(Exception):  # it may have begun, and comes to nothing
                    ray.cancel(answer)
            except ray.exceptions.RayActorError:  # Ray has repeated the message in vain
                if _answers(self._machines.pop(actor, None)):
                    home = self.pool  # the message has killed its worker each time
                    raise
            except Exception:
                home = self.pool
                raise
            finally:
                with self._lock:
                    home.append(actor)
            LOG.warning("a worker is lost with its machine: its clients are given to another one.")

    def add_actor_back_to_pool(self, future: Errand) -> None:
        """Do nothing: where its errand failed, a worker is back already."""

    def terminate_all_actors(self) -> None:
        """Leave it to Ray's own end to end the workers.

        Flower asks each to end itself just before, and Ray, which is told to restart workers, would
        say that this has failed and is tried again.
        """

    def _take(self) -> Any:
        """Take a worker out of the pool; of lost ones, only those that are back."""
        until = time.monotonic() + NO_WORKER_SECONDS
        while time.monotonic() < until:
            with self._lock:
                if self.pool and not self._away:
                    return self.pool.pop()
                for home in (self.pool, self._away):
                    for actor in reversed(home):
                        if is_actor_alive(actor) and (
                            home is self.pool or _answers(raylet_of(actor))
                        ):
                            home.remove(actor)
                            return actor
            time.sleep(LOOK_SECONDS / 4)
        raise RunError(
            f"no machine of the cluster has had a worker for {NO_WORKER_SECONDS:.0f} seconds."
        )


def _answers(machine: tuple[str, int] | None) -> bool:
    """Return True if a machine's raylet takes a connection, or is not known.

    Ray itself takes half a minute to find a machine dead, and until then calls its workers alive.
    """
    if machine is None:
        return True
    try:
        socket.create_connection(machine, timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def _came(answer: Any, actor: Any) -> bool:
    """Wait for an answer; False where its worker is lost, and not started again in time."""
    lost_since: float | None = None
    while not ray.wait([answer], timeout=LOOK_SECONDS)[0]:
        if is_actor_alive(actor):
            lost_since = None
            continue
        lost_since = lost_since or time.monotonic()
        if time.monotonic() - lost_since > HOMELESS_SECONDS:
            return False
    return True
