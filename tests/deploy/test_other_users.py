"""Another user of a machine: neither speaks for its node nor reads what server and node keep."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from deployed import Place

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user"),
]

NOBODY = 65534
# Everything is imported before the user changes: Python itself may lie where only this one reads.
INTRUDER = """
import os, signal, sys, time
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient

os.setgroups([])
os.setgid({nobody})
os.setuid({nobody})
refused = 0

def count(*_):  # Flower interrupts a process that is refused by 401, and means to end it
    global refused
    refused += 1

signal.signal(signal.SIGINT, count)
client = RuntimeHttpClient.from_server_address(
    server_address=sys.argv[1], insecure=True, root_certificates=None,
    interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperExec")],
    retry_invoker=make_simple_http_retry_invoker(),
)
print("trying", flush=True)
while True:
    try:
        got = client.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-clientapp"]))
        print("took" if got.token else "nothing", flush=True)
    except Exception as error:
        print("failed", type(error).__name__, refused, flush=True)
    time.sleep(0.02)
"""
READER = """
import os, sys
from pathlib import Path

os.setgroups([])
os.setgid({nobody})
os.setuid({nobody})
for name in sys.stdin.read().splitlines():
    try:
        print("read", name, len(Path(name).read_bytes()))
    except PermissionError:
        pass
"""


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A deployment below a folder that everybody may enter."""
    folder = Path(tempfile.mkdtemp(prefix="fedpet-users-"))
    folder.chmod(0o755)
    rows = tiny.make_rows(tmp_path / "rows", clients=1, rows_per_client=8)
    try:
        yield Place((tiny.make_backbone(tmp_path / "backbone"), rows), folder, ["one"])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def as_nobody(script: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", script.format(nobody=NOBODY), *arguments]


def test_another_user_of_the_device_is_given_no_message_and_reads_no_file(place: Place) -> None:
    changes = {"strategy_num_rounds": 2}
    with place.deploy(1, **changes) as real:
        script = (real.folder / "nodes" / "one" / "supernode.sh").read_text().split()
        address = f"127.0.0.1:{script[script.index('--port') + 1]}"
        real.start_server()
        real.register()
        real.start_node("one")
        with subprocess.Popen(
            as_nobody(INTRUDER, address), stdout=subprocess.PIPE, text=True
        ) as intruder:
            done = real.run(limit_seconds=400)
            intruder.kill()
            assert intruder.stdout is not None
            said = intruder.stdout.read().splitlines()
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        assert said[0] == "trying"
        tries = [line for line in said if line.startswith("failed HTTPStatusError")]
        assert len(tries) > 5, said  # it went on all the time
        assert int(tries[-1].split()[-1]) > 0, said  # refused by 401
        assert not [line for line in said if line.startswith(("took", "nothing"))]
        result = real.result("tiny-1")
        files = [path for path in real.folder.rglob("*") if path.is_file()]
        names = {path.name for path in files}
        assert {"superlink.db", "plan.bin", "node.key", "server.key", "rounds.jsonl"} <= names
        read = subprocess.run(
            as_nobody(READER), input="\n".join(map(str, files)), capture_output=True, text=True
        )
    assert (read.returncode, read.stdout) == (0, ""), read.stdout + read.stderr
    assert result["final_values_sha256"] == place.expected(["one"], **changes)
