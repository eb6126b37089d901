"""A device's certificate folder, and what can be done with it at the server's port: nothing."""

from __future__ import annotations

import contextlib
import http.client
import json
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from deployed import Place

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

THIEF = """
import sys, time
import httpx
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient

client = RuntimeHttpClient.from_server_address(
    server_address=sys.argv[1], insecure=False, root_certificates=open(sys.argv[2], "rb").read(),
    interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperExec")],
    retry_invoker=make_simple_http_retry_invoker(),
)
print("trying", flush=True)
while True:
    try:
        got = client.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-serverapp"]))
    except httpx.HTTPError as error:
        print("refused", error, flush=True)
        sys.exit(1)
    except Exception as error:
        print("refused", type(error).__name__, flush=True)
        sys.exit(1)
    if got.HasField("task") and got.token:
        print("took", got.task.type, flush=True)
        sys.exit(0)
    time.sleep(0.02)
"""


class Outsider:
    """A device that one folder of a node was copied to, beside the server itself."""

    def __init__(self, real: Any, folder: Path) -> None:
        self.real = real
        self.folder = folder
        home = folder / "flwr"
        home.mkdir(parents=True)
        self.certificate = real.folder / "nodes" / "a" / "ca.crt"
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "fedpet"\n[superlink.fedpet]\n'
            f'address = "127.0.0.1:{real.port}"\nroot-certificates = "{self.certificate}"\n'
        )

    def flwr(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self._flwr(self.folder / "flwr", *arguments)

    def on_server(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self._flwr(self.real.folder / "server" / "flwr", *arguments)

    def _flwr(self, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        server = self.real.folder / "server"
        command = "cd " + str(server) + f' && FLWR_HOME={home} exec flwr "$@"'
        done: subprocess.CompletedProcess[str] = self.real.call(
            "bash", "-c", command, "flwr", *arguments, limit_seconds=120
        )
        return done

    def runs(self) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = json.loads(
            self.on_server("ls", "fedpet", "--format", "json").stdout
        )["runs"]
        return listed

    def submit(self) -> str:
        """Submit the server's own run, which waits for nodes that never come; its id."""
        done = self.on_server("run", "app", "fedpet", "--format", "json")
        return str(json.loads(done.stdout)["run-id"])

    def status(self, run: str) -> str:
        return str(next(one["status"] for one in self.runs() if str(one["run-id"]) == run))


@pytest.fixture(scope="module")
def outsider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outsider]:
    folder = tmp_path_factory.mktemp("outsider")
    rows = tiny.make_rows(folder / "rows", clients=1, rows_per_client=8)
    place = Place((tiny.make_backbone(folder / "backbone"), rows), folder, ["a"])
    with place.deploy(1, strategy_num_rounds=1) as real:
        real.start_server()
        real.register()
        yield Outsider(real, folder / "device")


def test_no_run_is_submitted_with_a_device_s_folder(outsider: Outsider) -> None:
    done = outsider.flwr("run", "app", "fedpet", "--format", "json")
    assert '"run-id"' not in done.stdout, done.stdout
    assert outsider.runs() == []


def test_no_task_of_the_server_is_taken_with_a_device_s_folder(outsider: Outsider) -> None:
    address = f"127.0.0.1:{outsider.real.port}"
    with subprocess.Popen(
        [sys.executable, "-c", THIEF, address, str(outsider.certificate)],
        stdout=subprocess.PIPE,
        text=True,
    ) as thief:
        assert thief.stdout is not None
        assert thief.stdout.readline() == "trying\n"
        outsider.submit()
        time.sleep(5)
        thief.kill()
        assert "took" not in thief.stdout.read()


def test_no_run_is_stopped_and_no_log_read_with_a_device_s_folder(outsider: Outsider) -> None:
    run = outsider.submit()
    limit = time.monotonic() + 120
    while not outsider.on_server("log", run, "fedpet", "--show").stdout.strip():
        assert time.monotonic() < limit, "the run has no log"
        time.sleep(1)
    assert outsider.flwr("log", run, "fedpet", "--show").returncode != 0
    outsider.flwr("stop", run, "fedpet")
    assert outsider.status(run) == "running"


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/list-runs",
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/%2e%2e/control/list-runs",
        "//v1/fleet/pull-messages",
        "/docs",
        "/openapi.json",
        "/metrics",
    ],
)
def test_no_other_path_is_passed_on(outsider: Outsider, path: str) -> None:
    context = ssl.create_default_context(cafile=str(outsider.certificate))
    connection = http.client.HTTPSConnection("127.0.0.1", outsider.real.port, context=context)
    with contextlib.closing(connection):
        for method in ("GET", "POST"):
            connection.request(method, path, body=b"")
            with connection.getresponse() as answer:
                answer.read()
                assert answer.status == 403
