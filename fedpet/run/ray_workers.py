"""Workers of a simulation that die are started again, and asked again what they were asked.

Flower's pool (flwr 1.41 and 1.42, `ray_transport/ray_actor.py`) never replaces a worker: one that
was killed, for memory say, takes every later message of its node with it. Ray replaces it where it
is told to, and repeats the message to the new one; Flower sees one reply, as of any other. What
comes out is the same, since a message holds all that decides its reply (law 6).

Everything that leans on how Flower makes and ends its workers stands in this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

RESTARTS = {  # options of Ray's actors; Flower hands its client_resources on as these, as they are
    "max_restarts": -1,
    "max_task_retries": 3,  # of a message that kills its worker each time; then it is refused
}


@contextmanager
def workers_end_with_ray() -> Iterator[None]:
    """Leave it to Ray's own end to end the workers.

    Flower asks each to end itself just before, and Ray would say that this has failed and is tried
    again.
    """
    from flwr.simulation.ray_transport.ray_actor import BasicActorPool

    name = "terminate_all_actors"
    kept = getattr(BasicActorPool, name)
    setattr(BasicActorPool, name, lambda pool: None)
    try:
        yield
    finally:
        setattr(BasicActorPool, name, kept)
