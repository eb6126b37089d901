"""A server that turns on its nodes: what it asks of a real one is refused, and not executed.

The server's own app is replaced, as whoever has the server can: it sends each message to the node's
real processes, and writes down what comes back.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from deployed import Place
from hostile_plans import CASES, hostile
from tiny import Silent

from fedpet.protocol.frame import Frame, Refusal, pack_frame, unpack_frames
from fedpet.protocol.plan import Plan
from fedpet.protocol.registration import decode_registration
from fedpet.protocol.request import Request, write_request
from fedpet.run.prepare import prepare
from fedpet.utils.seeds import client_id64

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

RUN_SECONDS = 400.0
SERVER = """
import json, time
from pathlib import Path
from flwr.app import Message
from flwr.serverapp import ServerApp
from fedpet.protocol.request import from_record, to_record

app = ServerApp()

@app.main()
def main(grid, context):
    folder = Path({folder!r})
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.5)
    answers = {{}}
    for path in sorted(folder.glob("*.query")) + sorted(folder.glob("*.train")):
        content = to_record(path.read_bytes())
        kind = path.suffix.removeprefix(".")
        message = Message(content, dst_node_id=nodes[0], message_type=kind)
        replies = list(grid.send_and_receive([message], timeout=120))
        for reply in replies:
            error = reply.error.reason if reply.has_error() else None
            data = None if reply.has_error() else from_record(reply.content).hex()
            answers[path.name] = [error, data]
    (folder / "answers.json").write_text(json.dumps(answers))
"""
NODE = """
from pathlib import Path
Path({executed!r}).touch()
from flwr.clientapp import ClientApp
app = ClientApp()
"""
SECRET = "the patient of ward 7"


class Attack:
    """A real node after all messages: the answers, and what they have cost."""

    def __init__(self, answers: dict[str, list[Any]], log: str) -> None:
        self.answers = answers
        self.log = log
        self.grown_mib: dict[int, float] = {}
        self.cpu_seconds = 0.0
        self.left_bytes = 0
        self.executed = False
        self.final = ""

    def reason(self, name: str) -> str:
        """Return the answer of the node to a message, as its server reads it."""
        error, data = self.answers[name]
        if error is not None:
            return str(error)
        parts = list(unpack_frames(bytes.fromhex(data), max_frames=20_000, max_payload_bytes=0))
        assert all(isinstance(part, Refusal) for part in parts)
        return parts[0].text  # type: ignore[union-attr]


def messages(plan: Plan) -> Iterator[tuple[str, bytes]]:
    """Each file's name, and the message in it."""
    frame = pack_frame(Frame(Plan.digest(b""), 1, 0, "float32", 5, 0, 0.0, 0.0, b""))
    one = client_id64("one")
    for case in CASES:
        data = hostile(plan, case)
        mine = pack_frame(Frame(Plan.digest(data), 1, 0, "float32", 5, 0, 0.0, 0.0, b""))
        yield f"{case}.query", write_request(Request((), b"", data))
        yield f"{case}.train", write_request(Request((one,), mine, data))
    yield "one-client-a-million-times.train", write_request(Request((one,) * 10**6, frame))
    many = tuple(range(1, 10**6 + 1))
    yield "a-million-clients.train", write_request(Request(many, frame))
    yield "no-request.query", b"\xff" * (8 << 20)
    renamed = replace(plan, task=replace(plan.task, label_names=("x", "y")))
    yield "labels.query", write_request(Request((), b"", renamed.to_bytes()))


def peaks_kib(pids: set[int]) -> dict[int, int]:
    """The most that each process ever had in memory."""
    found = {}
    for pid in pids:
        [line] = [
            line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmHWM" in line
        ]
        found[pid] = int(line.split()[1])
    return found


def cpu_seconds(pids: set[int]) -> float:
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


@pytest.fixture(scope="module")
def attack(tmp_path_factory: pytest.TempPathFactory) -> Attack:
    """All messages to one node, and afterwards an honest round with the same processes."""
    from benchmarks.real_nodes import descendants

    folder = tmp_path_factory.mktemp("hostile")
    rows = tiny.make_rows(folder / "rows", clients=1, rows_per_client=8)
    place = Place((tiny.make_backbone(folder / "backbone"), rows), folder, ["one"])
    changes = {"strategy_num_rounds": 1}
    with place.deploy(1, **changes) as real:
        data = real.folder / "nodes" / "one" / "data.jsonl"
        lines = data.read_text().splitlines()
        row = {**json.loads(lines[0]), "text": SECRET}
        data.write_text("\n".join([json.dumps(row), *lines[1:]]) + "\n")
        sent = folder / "sent"
        sent.mkdir()
        settings = replace(place.experiment("plan", **changes), clients=replace(
            place.experiment("plan", **changes).clients, partition="nodes", num_clients=1
        ))  # fmt: skip
        for name, content in messages(prepare(settings, Silent()).plan):
            (sent / name).write_bytes(content)
        real.start_server()
        real.register()
        node = real.start_node("one")
        honest_round(real)  # all that a round loads is there before anything is measured
        app = real.folder / "server" / "app"
        honest = {name: (app / name).read_bytes() for name in ("on_server.py", "on_node.py")}
        executed = folder / "executed"
        (app / "on_server.py").write_text(SERVER.format(folder=str(sent)))
        (app / "on_node.py").write_text(NODE.format(executed=str(executed)))
        pids = {node.pid, *descendants(node.pid)}
        cache = real.folder / "nodes" / "one" / "cache"
        kept = stored(cache)
        before, used = peaks_kib(pids), cpu_seconds(pids)
        # Another column is asked for as well, by the run's config.
        done = real.run("data-label-column='text'", limit_seconds=RUN_SECONDS)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        found = Attack(json.loads((sent / "answers.json").read_text()), real.log("one"))
        after = peaks_kib(pids)
        found.grown_mib = {pid: (after[pid] - before[pid]) / 1024 for pid in pids}
        found.cpu_seconds = cpu_seconds(pids) - used
        found.left_bytes = stored(cache) - kept
        found.executed = executed.exists()
        for name, content in honest.items():
            (app / name).write_bytes(content)
        honest_round(real)
        found.final = real.result("tiny-2")["run"]["status"]
        assert len(re.findall(r"worker \d+ is ready", real.log("one"))) == 1
    return found


def honest_round(real: Any) -> None:
    done = real.run(limit_seconds=RUN_SECONDS)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def stored(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["query", "train"])
def test_a_hostile_plan_is_refused_by_the_limit_that_it_is_beyond(
    attack: Attack, case: str, kind: str
) -> None:
    assert CASES[case] in attack.reason(f"{case}.{kind}")


def test_a_client_that_is_named_a_million_times_is_trained_not_once(attack: Attack) -> None:
    assert "names each client once" in attack.reason("one-client-a-million-times.train")
    assert "max-clients = 10000" in attack.reason("a-million-clients.train")


def test_bytes_that_are_no_request_are_refused(attack: Attack) -> None:
    error, data = attack.answers["no-request.query"]
    assert data is None
    assert "FrameError" in error


def test_no_row_leaves_by_a_refusal(attack: Attack) -> None:
    """The server asks for another column as the label: the device's own is read all the same."""
    error, data = attack.answers["labels.query"]
    assert error is None
    assert decode_registration(bytes.fromhex(data)).num_rows == {"one": 8}
    answers = [str(error) + bytes.fromhex(data or "").decode("latin-1")
               for error, data in attack.answers.values()]  # fmt: skip
    assert not [answer for answer in answers if SECRET in answer]


def test_the_node_s_memory_and_processor_stay_as_they_were(attack: Attack) -> None:
    """Of the largest message, 9 MB, some copies; of what the plans ask for, gigabytes, nothing."""
    assert max(attack.grown_mib.values()) < 150, attack.grown_mib
    assert attack.cpu_seconds < 90
    assert attack.left_bytes < 1 << 20


def test_the_server_s_code_is_not_executed_on_the_node(attack: Attack) -> None:
    assert not attack.executed


def test_the_same_processes_train_an_honest_round_afterwards(attack: Attack) -> None:
    assert attack.final == "ok"
