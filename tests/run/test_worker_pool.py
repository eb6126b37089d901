"""Hand messages on where a worker is lost; Ray is played."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from fedpet.errors import RunError

pytest.importorskip("ray")
from fedpet.run import worker_pool
from fedpet.run.worker_pool import WorkerPool


class Worker:
    """Answers, unless its machine is dead."""

    def __init__(self, name: str) -> None:
        self.name, self.is_alive, self.asked = name, True, 0

    def run(self, app: Any, message: str, cid: str, context: str) -> tuple[Worker, str]:
        self.asked += 1
        return self, message


class PlayedRay:
    """Ray's three calls on answers of `Worker`; an error stands in for an answer."""

    error: Exception | None = None

    def wait(self, answers: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        if answers[0][0].is_alive:
            return answers, []
        time.sleep(timeout)
        return [], answers

    def get(self, answer: tuple[Worker, str]) -> tuple[str, str, str]:
        if self.error:
            raise self.error
        return "0", f"{answer[1]} by {answer[0].name}", "context"

    def cancel(self, answer: Any) -> None: ...

    exceptions = SimpleNamespace(RayActorError=ConnectionError)


class FlowersPool:
    """Stand in for Flower's pool, with room for eight."""

    def __init__(self, actors: list[Worker]) -> None:
        self.pool, self.actors_capacity = [*actors], 8


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> list[Worker]:
    return [Worker("first"), Worker("last")]


@pytest.fixture
def pool(workers: list[Worker], monkeypatch: pytest.MonkeyPatch) -> WorkerPool:
    monkeypatch.setattr(worker_pool, "ray", PlayedRay())
    monkeypatch.setattr(worker_pool, "is_actor_alive", lambda worker: worker.is_alive)
    monkeypatch.setattr(worker_pool, "raylet_of", lambda worker: (worker.name, 1))
    monkeypatch.setattr(worker_pool, "_answers", lambda machine: machine != ("last", 1))
    for name, seconds in (("LOOK", 0.02), ("HOMELESS", 0.05), ("NO_WORKER", 0.3)):
        monkeypatch.setattr(worker_pool, f"{name}_SECONDS", seconds)
    return type("Pool", (WorkerPool, FlowersPool), {})(workers=2, actors=workers)


def send(pool: WorkerPool, message: str) -> Any:
    errand = pool.submit(
        lambda worker, *job: worker.run(*job),
        (None, message, "0", "context"),  # type: ignore[arg-type]
    )
    return pool.fetch_result_and_return_actor_to_pool(errand)[0]


def test_a_cluster_with_more_room_starts_no_more_workers_than_asked_for(pool: WorkerPool) -> None:
    assert pool.actors_capacity == 2


def test_a_lost_worker_s_message_goes_to_another_and_it_is_not_asked_until_it_is_back(
    pool: WorkerPool, workers: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, last = workers
    last.is_alive = False
    assert send(pool, "one") == "one by first"
    assert send(pool, "two") == "two by first"
    assert last.asked == 1
    first.is_alive, last.is_alive = False, True
    monkeypatch.setattr(worker_pool, "_answers", lambda machine: True)
    assert send(pool, "three") == "three by last"


def test_a_worker_that_is_started_again_in_time_keeps_its_message(
    pool: WorkerPool, workers: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_pool, "HOMELESS_SECONDS", 60.0)
    first, last = workers
    last.is_alive = False
    threading.Timer(0.1, lambda: setattr(last, "is_alive", True)).start()
    assert send(pool, "one") == "one by last"
    assert first.asked == 0


def test_a_worker_that_died_of_its_message_is_back_in_the_pool(
    pool: WorkerPool, workers: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PlayedRay, "error", SystemError("it died"))
    with pytest.raises(SystemError):
        send(pool, "one")
    assert len(pool.pool) == 2


def test_a_message_that_ray_repeated_in_vain_goes_on_if_the_machine_is_gone_and_is_refused_if_not(
    pool: WorkerPool, workers: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, last = workers
    errors = [ConnectionError("Ray has not found the machine dead yet")]

    def get(ray: PlayedRay, answer: tuple[Worker, str]) -> tuple[str, str, str]:
        if errors:
            raise errors.pop()
        return "0", f"{answer[1]} by {answer[0].name}", "context"

    monkeypatch.setattr(PlayedRay, "get", get)
    assert send(pool, "one") == "one by first"  # of the last's machine nothing answers
    assert send(pool, "two") == "two by first"
    assert last.asked == 1
    errors.append(ConnectionError("its worker died each time"))
    with pytest.raises(ConnectionError):
        send(pool, "three")
    assert send(pool, "four") == "four by first"


def test_where_no_machine_is_left_the_message_is_refused_and_says_so(
    pool: WorkerPool, workers: list[Worker]
) -> None:
    for worker in workers:
        worker.is_alive = False
    with pytest.raises(RunError, match="no machine of the cluster has had a worker"):
        send(pool, "one")


def test_flower_waits_for_every_worker_at_once() -> None:
    vce_api = pytest.importorskip("flwr.server.superlink.fleet.vce.vce_api")
    from fedpet.protocol.flower_compat.flower_simulation import mixed_into_pool

    flowers = vce_api.ThreadPoolExecutor
    with mixed_into_pool(WorkerPool, 100), vce_api.ThreadPoolExecutor() as executor:
        together = threading.Barrier(100)
        waits = [executor.submit(together.wait, 20) for _ in range(100)]
        assert {wait.result() for wait in waits} == {*range(100)}
    assert vce_api.ThreadPoolExecutor is flowers
