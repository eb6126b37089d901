"""Test a node's SuperNode: when it asks the server, and that its worker is started again."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from flwr.supercore.protobuf import client as protobuf_client
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

from fedpet.client import supernode
from fedpet.client.supernode import (
    ACTIVE_SECONDS,
    LONGEST_RESTART_SECONDS,
    POLL_SECONDS,
    SETTLED_SECONDS,
    PollPause,
    keep_running,
)
from fedpet.protocol.flower_compat import flower_supernode as compat


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def pauses(pause: PollPause, clock: Clock, count: int, *, came: bool = False) -> list[float]:
    found = []
    for _ in range(count):
        found.append(pause(came))
        clock.now += found[-1]
    return found


def test_a_node_asks_as_often_as_flower_s_while_rounds_follow_one_another() -> None:
    clock = Clock()
    pause = PollPause(60, clock)
    assert set(pauses(pause, clock, int(ACTIVE_SECONDS / POLL_SECONDS))) == {POLL_SECONDS}
    assert set(pauses(pause, clock, 1000, came=True)) == {POLL_SECONDS}


def test_an_idle_node_asks_less_often_and_a_message_brings_it_back() -> None:
    clock = Clock()
    pause = PollPause(60, clock)
    pauses(pause, clock, 200)
    assert pause(False) == 60
    assert pause(True) == POLL_SECONDS
    assert pause(False) == POLL_SECONDS


def test_a_day_of_an_idle_node_is_a_twentieth_of_flower_s_questions() -> None:
    clock, count = Clock(), 0
    pause = PollPause(60, clock)
    while clock.now < 86400:
        clock.now += pause(False)
        count += 1
    assert 20 * count >= 86400 / POLL_SECONDS >= 18 * count


def test_a_worker_that_ends_is_started_again_later_and_later() -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        keep_running(lambda: SETTLED_SECONDS + 1 if len(slept) == 10 else 1.0, sleep)
    assert slept[:3] == [1.0, 2.0, 4.0]
    assert max(slept) == LONGEST_RESTART_SECONDS == slept[9]
    assert slept[10] == 1.0  # it had run for long


def test_a_node_s_arguments_are_flower_s_but_for_its_own_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options, flower = supernode._parse(
        ["--longest-poll", "9", "--superlink", "a:1", "--port", "8101", "--node-config", "x.toml"]
    )
    assert (options.longest_poll, options.port) == (9.0, 8101)
    parsed = _parse_args_run_supernode().parse_args(flower)
    assert (parsed.superlink, parsed.node_config) == ("a:1", "x.toml")


def test_the_supernode_takes_the_secret_from_no_disk_and_the_pauses_from_fedpet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[str, Any] = {}
    slept: list[float] = []
    beats: list[int] = []

    def flower_supernode() -> None:

        from flwr.supercore.auth import load_superexec_auth_secret

        arguments = _parse_args_run_supernode().parse_args(sys.argv[1:])
        seen["isolation"] = arguments.isolation
        seen["secret"] = load_superexec_auth_secret(arguments.superexec_auth_secret_file)
        for seconds in (3, 0.5, 3, 3):  # of Flower's loop: idle, a message, idle
            start_client_internal.time.sleep(seconds)
            beats.append(fleet_http_connection.HEARTBEAT_DEFAULT_INTERVAL)
        seen["limits"] = protobuf_client.httpx.Client.keywords["limits"].keepalive_expiry

    module = sys.modules["flwr.supernode.cli.flower_supernode"]
    monkeypatch.setattr(module, "flower_supernode", flower_supernode)
    monkeypatch.setattr(compat.time, "sleep", slept.append)
    monkeypatch.setattr("sys.argv", ["node"])
    for module in ("supercore.heartbeat", "supernode.fleet_http_connection"):
        monkeypatch.setattr(f"flwr.{module}.HEARTBEAT_DEFAULT_INTERVAL", 30)
    monkeypatch.setattr(start_client_internal, "time", start_client_internal.time)
    monkeypatch.setattr(protobuf_client, "httpx", protobuf_client.httpx)
    compat.run_supernode(
        ["--insecure"],
        b"secret",
        pause=lambda came: 7.0 if came else 60.0,
        heartbeat=lambda seconds: 30 if seconds < 60 else 300,
    )
    assert seen == {"isolation": "process", "secret": b"secret", "limits": 600.0}
    assert slept == [60.0, 0.5, 7.0, 60.0]
    assert beats == [300, 300, 30, 300]


def test_flower_s_loop_still_waits_as_the_pauses_reckon() -> None:
    import inspect

    source = inspect.getsource(start_client_internal)
    waits = [part.partition(")")[0] for part in source.split("time.sleep(")[1:]]
    assert waits == [str(compat._IDLE_SECONDS), "0.5", "0.5"]


def test_the_supernode_s_process_loads_neither_torch_nor_transformers() -> None:
    import json
    import subprocess

    code = "import fedpet.client.supernode, json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "fedpet.client.node"} & set(json.loads(done.stdout))
