"""Test the worker: Flower's own Runtime API over HTTP, and stand-ins for what goes wrong."""

from __future__ import annotations

import logging
from contextlib import closing
from typing import Any

import pytest
from runtime_api import RuntimeApi, bundle, runtime_api

from fedpet.client import worker
from fedpet.client.worker import (
    LONGEST_PAUSE,
    MAX_PROJECT_BYTES,
    SHORTEST_PAUSE,
    _digest_in,
    answer_task,
    serve,
)
from fedpet.config import Experiment
from fedpet.errors import FrameError
from fedpet.protocol.flower_compat.flower_supernode import RuntimeTasks
from fedpet.protocol.request import from_record
from fedpet.utils.source_digest import code_digest

SECRET = b"0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def api() -> Any:
    level = logging.getLogger("flwr").level
    logging.getLogger("flwr").setLevel(logging.CRITICAL)  # its handler outlives no test
    with runtime_api(SECRET) as api:
        yield api
    logging.getLogger("flwr").setLevel(level)


def project(code: str) -> dict[str, Any]:
    return {"project": {"name": "app", "version": "1"}, "tool": {"fedpet": {"code-digest": code}}}


def acquired(api: RuntimeApi, secret: bytes = SECRET) -> Any:
    with closing(RuntimeTasks(api.address, secret)) as tasks:
        return tasks.acquire()


def answer_one(api: RuntimeApi) -> Any:
    task = acquired(api)
    assert task is not None
    try:
        answer_task(task)
    finally:
        task.close()
    [reply] = api.replies()
    api.state.delete_messages(
        message_ids=[reply.metadata.message_id, reply.metadata.reply_to_message_id]
    )
    return reply


def test_a_message_comes_from_the_supernode_and_its_answer_goes_there(
    api: RuntimeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def reply(message: Any, config: Any) -> Any:
        from flwr.app import Message

        from fedpet.protocol.request import to_record

        asked.append((from_record(message.content), config.client))
        return Message(to_record(b"an answer"), reply_to=message)

    monkeypatch.setattr("fedpet.client.node.reply", reply)
    api.put(
        b"a request",
        fab=bundle(project(code_digest())),
        run_config=Experiment().to_run_config(),
        node_config={"data": "rows.jsonl", "client": "ward-1"},
    )
    sent = answer_one(api)
    assert asked == [(b"a request", "ward-1")]
    assert not sent.has_error()
    assert acquired(api) is None  # it is answered


def test_who_has_not_the_secret_is_given_no_message(api: RuntimeApi) -> None:
    for other in (b"another secret, of the same size", SECRET[:-1]):
        with pytest.raises(KeyboardInterrupt):  # Flower interrupts the process at a 401
            acquired(api, other)


def test_the_code_of_the_server_s_bundle_is_never_executed(api: RuntimeApi, tmp_path: Any) -> None:
    touched = tmp_path / "executed"
    code = f"open({str(touched)!r}, 'w')"
    app = project(code_digest()) | {
        "tool": {"flwr": {"app": {"components": {"clientapp": "on_node:app"}}}}
    }
    api.put(b"no request", fab=bundle(app, on_node=code, sitecustomize=code))
    assert answer_one(api).has_error()
    assert not touched.exists()


def test_a_bundle_of_other_code_is_refused_and_logged_on_the_node(
    api: RuntimeApi, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "fedpet"):
        api.put(b"", fab=bundle(project("0" * 64)), run_config=Experiment().to_run_config())
        reason = answer_one(api).error.reason
    assert "install the deployment's server/app" in reason
    assert "install the deployment's server/app" in caplog.text


def test_what_another_library_says_stays_in_the_node_s_log(
    api: RuntimeApi, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def reply(message: Any, config: Any) -> Any:
        raise ValueError("row 7 is 'the patient ...'")

    monkeypatch.setattr("fedpet.client.node.reply", reply)
    api.put(b"", run_config=Experiment().to_run_config())
    reason = answer_one(api).error.reason
    assert reason == "it failed with ValueError: see the node's log."
    assert "the patient" in caplog.text


@pytest.mark.parametrize(
    "content",
    [b"", b"PK", bundle({"a": "x" * MAX_PROJECT_BYTES}).content, bundle({}).content[:60]],
    ids=["empty", "cut-short", "too-much", "headless"],  # a bundle holds the time
)
def test_a_bundle_that_is_none_or_opens_to_too_much_is_refused(content: bytes) -> None:
    with pytest.raises(FrameError, match=r"no pyproject.toml that can be read"):
        _digest_in(content)


# -- stand-ins ---------------------------------------------------------------------------------


class Task:
    def __init__(self) -> None:
        self.is_open = True

    def close(self) -> None:
        self.is_open = False


class Tasks:
    """Gives what it is given, and then ends the worker."""

    def __init__(self, *given: Any) -> None:
        self._given = list(given)

    def acquire(self) -> Any:
        if not self._given:
            raise KeyboardInterrupt
        one = self._given.pop(0)
        if isinstance(one, Exception):
            raise one
        return one


def served(*given: Any, answer: Any = lambda task: None) -> list[float]:
    pauses: list[float] = []
    with pytest.raises(KeyboardInterrupt):
        serve(Tasks(*given), answer, sleep=pauses.append)
    return pauses


def test_an_idle_worker_asks_less_and_less_often_and_a_message_wakes_it() -> None:
    pauses = served(*[None] * 9, Task(), None)
    assert pauses[0] == pauses[-1] == SHORTEST_PAUSE
    assert pauses[:-1] == sorted(pauses[:-1])
    assert pauses[-2] == LONGEST_PAUSE


def test_a_supernode_that_is_gone_for_a_while_does_not_end_the_worker() -> None:
    answered = []
    task = Task()
    pauses = served(OSError("refused"), OSError("refused"), task, answer=answered.append)
    assert answered == [task]
    assert pauses == [SHORTEST_PAUSE, 2 * SHORTEST_PAUSE]


def test_a_message_whose_answer_is_not_taken_does_not_end_the_worker() -> None:
    tasks = [Task(), Task()]

    def answer(task: Any) -> None:
        raise OSError("403 Forbidden")

    served(*tasks, answer=answer)
    assert [task.is_open for task in tasks] == [False, False]


def test_messages_that_wait_are_answered_without_a_pause() -> None:
    assert served(Task(), Task(), Task()) == []


def test_the_worker_ends_when_its_supernode_s_process_does(tmp_path: Any) -> None:
    import subprocess
    import sys

    code = (
        "import threading, time; from fedpet.client import worker; "
        "threading.Thread(target=worker._end_with_parent).start(); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(30) == 0
    assert worker.main.__doc__
