"""The relay before SuperLink: what it passes on, what it refuses, and what it remembers."""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_public_key,
)
from flwr.proto.message_pb2 import PushObjectRequest

from fedpet.deploy import server_metrics
from fedpet.deploy.certificates import make_node_key
from fedpet.deploy.node_status import read_status, write_status
from fedpet.deploy.relay import Relay
from fedpet.deploy.relay_limits import Limits
from fedpet.server.allowed_nodes import AllowedNodes

POLL = "/v1/fleet/pull-messages"
PUSH = "/v1/fleet/push-object"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "nodes").mkdir()
    for name in ("a", "b"):
        (tmp_path / "nodes" / f"{name}.pub").write_bytes(make_node_key()[1])
    return tmp_path


def key_of(folder: Path, name: str) -> bytes:
    public = load_ssh_public_key((folder / "nodes" / f"{name}.pub").read_bytes())
    return base64.b64encode(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


class Behind:
    """A SuperLink that notes what reaches it, and a relay before it."""

    def __init__(self, folder: Path, limits: Limits | None = None) -> None:
        self.folder, self.seen = folder, list[httpx.Request]()
        self.answer = httpx.Response(200, content=b"from SuperLink", headers={"flwr-x": "y"})
        transport = httpx.MockTransport(self._reach)
        client = httpx.AsyncClient(transport=transport, base_url="https://127.0.0.1:1")
        page = server_metrics.page_of(folder)
        allowed = AllowedNodes(folder / "nodes")
        self.relay = Relay(client, allowed, limits=limits, monitor_port=99, metrics=page)

    def _reach(self, request: httpx.Request) -> httpx.Response:
        self.seen.append(request)
        stream = httpx.ByteStream(self.answer.content)
        return httpx.Response(self.answer.status_code, headers=self.answer.headers, stream=stream)

    def ask(
        self,
        path: str,
        body: bytes = b"",
        *,
        node: str = "a",
        method: str = "POST",
        port: int = 8000,
        headers: dict[bytes, bytes] | None = None,
        key: bytes = b"",
    ) -> httpx.Response:
        """Ask as a device would; of an unknown node by any key."""
        key = key or (key_of(self.folder, node) if node else b"c29tZSBrZXk=")
        plain, _, query = path.partition("?")
        given = {b"flwr-public-key": key, b"content-length": str(len(body)).encode()}
        scope = {
            "type": "http", "method": method, "path": plain, "raw_path": plain.encode(),
            "query_string": query.encode(), "server": ("127.0.0.1", port),
            "client": ("10.0.0.9", 5), "headers": [*{**given, **(headers or {})}.items()],
        }  # fmt: skip
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(event: Any) -> None:
            sent.append(event)

        asyncio.run(self.relay(scope, receive, send))
        content = b"".join(event.get("body", b"") for event in sent[1:])
        return httpx.Response(sent[0]["status"], content=content, headers=sent[0]["headers"])


def test_a_node_s_request_comes_through_as_it_is(folder: Path) -> None:
    behind = Behind(folder)
    answer = behind.ask(POLL, b"body", headers={b"flwr-signature": b"s", b"cookie": b"c"})
    assert (answer.status_code, answer.content) == (200, b"from SuperLink")
    assert answer.headers["flwr-x"] == "y"
    [request] = behind.seen
    assert (request.url.path, request.content) == (POLL, b"body")
    assert request.headers["flwr-signature"] == "s"
    assert "cookie" not in request.headers


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/runtime/acquire-task",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/pull-messages/more",
        "/v1/fleet/pull-messages?x=1",
        "/v1/fleet/",
        "/v1/Fleet/pull-messages",
        "//v1/fleet/pull-messages",
        "/docs",
        "/metrics",
        "/",
    ],
)
@pytest.mark.parametrize("method", ["POST", "GET"])
def test_nothing_but_the_fleet_path_is_passed_on(folder: Path, path: str, method: str) -> None:
    behind = Behind(folder)
    assert behind.ask(path, method=method).status_code == 403
    assert behind.seen == []


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "HEAD"])
def test_nothing_but_a_post_is_passed_on(folder: Path, method: str) -> None:
    behind = Behind(folder)
    assert behind.ask(POLL, method=method).status_code == 403
    assert behind.seen == []


def test_an_unknown_key_may_try_to_register_and_nothing_else(folder: Path) -> None:
    behind = Behind(folder)
    assert behind.ask(POLL, node="").status_code == 401
    assert behind.ask(PUSH, b"x", node="").status_code == 401
    assert behind.ask(POLL, key=b"no base64!").status_code == 401
    assert behind.seen == []
    behind.answer = httpx.Response(403, content=b"code 2004")
    assert behind.ask("/v1/fleet/register-node", node="").content == b"code 2004"


def test_a_key_that_is_taken_out_is_unknown_when_the_folder_is_looked_at(folder: Path) -> None:
    behind = Behind(folder, Limits(folder_seconds=0))
    key = key_of(folder, "a")
    assert behind.ask(POLL, key=key).status_code == 200
    (folder / "nodes" / "a.pub").unlink()
    assert behind.ask(POLL, key=key).status_code == 401
    assert behind.ask(POLL, node="b").status_code == 200


def test_a_body_is_bounded_by_its_path_before_it_is_read(folder: Path) -> None:
    behind = Behind(folder, Limits(object_bytes=1000, message_bytes=100, other_bytes=10))
    for path, most in (
        (POLL, 10), ("/v1/fleet/push-messages", 100), ("/v1/fleet/activate-node", 10)
    ):  # fmt: skip
        assert behind.ask(path, bytes(most)).status_code == 200
        assert behind.ask(path, bytes(most + 1)).status_code == 413
        huge = {b"content-length": b"9" * 30}
        assert behind.ask(path, b"", headers=huge).status_code == 413
    assert behind.ask(POLL, b"", headers={b"content-length": b"-1"}).status_code == 411
    chunked = {b"transfer-encoding": b"chunked"}
    assert behind.ask(POLL, b"1", headers=chunked).status_code == 411
    assert behind.ask(POLL, b"12345", headers={b"content-length": b"2"}).status_code == 413


def test_a_reply_is_bounded_over_all_its_objects_and_another_is_counted_anew(folder: Path) -> None:
    behind = Behind(folder, Limits(reply_bytes=2500))

    def push(session: str, size: int) -> int:
        request = PushObjectRequest(
            run_id=1 << 60, object_id="o", object_content=bytes(size), session_id=session
        )
        return behind.ask(PUSH, request.SerializeToString()).status_code

    assert [push("s", 1000), push("s", 1000), push("s", 1000)] == [200, 200, 413]
    assert push("t", 1000) == 200
    assert (
        behind.ask(PUSH, PushObjectRequest(object_content=b"x").SerializeToString()).status_code
        == 400
    )
    assert behind.ask(PUSH, b"\x0a\xff\xff\xff\xff").status_code == 400
    assert behind.ask(PUSH, b"\xff" * 50).status_code == 400


def test_a_node_that_asks_too_often_waits_and_no_other_does(folder: Path) -> None:
    behind = Behind(folder, Limits(rate=0.001, burst=3))
    assert [behind.ask(POLL).status_code for _ in range(5)] == [200, 200, 200, 503, 503]
    assert behind.ask(POLL, node="b").status_code == 200
    assert behind.relay.status["a"].refused == 2


def test_health_says_whether_superlink_answers_and_metrics_are_on_the_loopback_alone(
    folder: Path,
) -> None:
    behind = Behind(folder)
    assert behind.ask("/health", method="GET").status_code == 200
    behind.answer = httpx.Response(500)
    assert behind.ask("/health", method="GET", port=99).status_code == 503
    assert behind.ask("/metrics", method="GET").status_code == 403
    there = importlib.util.find_spec("prometheus_client") is not None
    assert behind.ask("/metrics", method="GET", port=99).status_code == (200 if there else 501)
    assert behind.ask(POLL, port=99).status_code == 404


def test_what_is_known_of_a_node_is_written_and_read_again(folder: Path) -> None:
    behind = Behind(folder)
    behind.ask(POLL, b"body", headers={b"flwr-package-version": b"1.41.0\x1b[31m"})
    write_status(folder / "s.json", behind.relay.status)
    status = read_status(folder / "s.json")["a"]
    assert (status.address, status.flower_version) == ("10.0.0.9", "1.41.031m")
    assert (status.requests, status.received_bytes, status.sent_bytes) == (1, 4, 14)
    (folder / "s.json").write_text("{")
    assert read_status(folder / "s.json") == {}


def test_a_refusal_s_line_holds_no_control_characters(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Behind(folder).ask("/v1/\x1b[31m\nforged line")
    assert "\x1b" not in caplog.text
    assert "\nforged" not in caplog.text


def test_the_page_of_metrics_reads_back(folder: Path) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    run = folder / "runs" / "r-1"
    run.mkdir(parents=True)
    line = {"round": 2, "clients": 3, "replies": 2, "round_seconds": 4.5, "loss": None}
    line |= {"uplink_bytes": 10, "wire_bytes": 30, "refused": [{"who": "b", "reason": "x"}]}
    first = json.dumps({**line, "round": 1})
    (run / "rounds.jsonl").write_text(f'{first}\n{json.dumps(line)}\n{{"round": 3, "cl')
    behind = Behind(folder)
    behind.ask(POLL)
    page = behind.ask("/metrics", method="GET", port=99).text
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in parser.text_string_to_metric_families(page)
        for sample in family.samples
    }
    assert found["fedpet_round", "r-1"] == 2
    assert found["fedpet_uplink_bytes_total", "r-1"] == 20
    assert found["fedpet_refusals_total", "r-1", "b"] == 2
    assert found["fedpet_node_requests_total", "a"] == 1
    assert found["fedpet_disk_bytes", "runs"] == (run / "rounds.jsonl").stat().st_size
