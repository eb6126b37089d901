"""Compare the ledger of a deployment with every byte on its sockets.

    python -m benchmarks.socket_vs_ledger [--rounds 3] [--out FILE]

A SuperLink and three SuperNodes over TLS, each behind a counting proxy (`wiretap`), run the default
job. Held against each other: the sum of all messages as the nodes fetched and sent them, and the
ledger's `wire_bytes`, which must be equal; and all bytes on the sockets against `wire_bytes` with
the terms below, which must agree to 2 % (law 9).

Flower 1.41 sends a message as a tree of objects, a request each, over HTTP/1.1. That costs the same
beside every message:

    DOWN_BYTES, UP_BYTES    a message to a node, and from one: requests, answers, identification
    POLL_BYTES              an idle node asks for messages every 3 s; or for a part not yet there
    HEARTBEAT_BYTES         and says that it lives every 30 s, or a little before
    SOCKET_BYTES            a connection is opened anew after 5 s without a request
    JOIN_BYTES              a node comes and goes
    the app bundle          once a node and run: the files that `fedpet deploy` packs, with fedpet
    again                   bytes cut off with a connection, or sent again after that

A message of more than 5 MiB is cut, and costs a request more for each part.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.proto.fleet_pb2 import ActivateNodeResponse, PullMessagesResponse
from flwr.proto.message_pb2 import PullObjectResponse, PushObjectRequest

from benchmarks.deploy_demo import EXPERIMENT, NODES, RUN_SECONDS, write_thirds
from benchmarks.real_nodes import RealNodes, loopback_deployment
from benchmarks.socket_proxy import Exchange, Tapped, Wiretap
from fedpet.config import Experiment
from fedpet.data import count_clients
from fedpet.deploy import write_deployment
from fedpet.run.run_folder import machine, versions

# Measured, of flwr 1.41 over TLS 1.3. A request with its answer takes about 1.1 KB, most of it the
# node's signature and key; a message goes to a node in seven of them, and from one in six.
DOWN_BYTES = 8_500
UP_BYTES = 8_050
POLL_BYTES = 1_075
HEARTBEAT_BYTES = 1_095
SOCKET_BYTES = 2_050
JOIN_BYTES = 2_375
TOLERANCE = 0.02  # of the messages' bytes

_FLEET = "/v1/fleet/"
_PURPOSES = {
    "pull-object": "down",
    "confirm-message-received": "down",
    "push-object": "up",
    "push-messages": "up",
    "get-run": "app",
    "get-fab": "app",
    "send-node-heartbeat": "heartbeat",
    "register-node": "join",
    "activate-node": "join",
    "deactivate-node": "join",
    "unregister-node": "join",
}


@dataclass(frozen=True)
class NodeBooks:
    """Hold the bytes in one node's proxy, by purpose.

    Attributes:
        node_id: Flower's.
        up_bytes: On the socket, from the node.
        down_bytes: On the socket, to the node.
        messages_up_bytes: Of these the messages themselves, as Flower serialises them.
        messages_down_bytes: Likewise.
        messages_up: How many.
        messages_down: How many.
        beside: Purpose -> bytes of requests and answers without the messages in them.
        requests: Purpose -> requests.
        sealing_bytes: What TLS adds: handshakes, records.
        sockets: Connections made.
    """

    node_id: str
    up_bytes: int
    down_bytes: int
    messages_up_bytes: int
    messages_down_bytes: int
    messages_up: int
    messages_down: int
    beside: dict[str, int]
    requests: dict[str, int]
    sealing_bytes: int
    sockets: int

    @property
    def wire_bytes(self) -> int:
        """All messages of the node, both ways."""
        return self.messages_up_bytes + self.messages_down_bytes

    @property
    def socket_bytes(self) -> int:
        """All bytes on the node's sockets, both ways."""
        return self.up_bytes + self.down_bytes

    def terms(self) -> dict[str, int]:
        """Return the stated terms of this node's traffic, in bytes."""
        return {
            "messages": self.messages_down * DOWN_BYTES + self.messages_up * UP_BYTES,
            "polls": self.requests.get("poll", 0) * POLL_BYTES,
            "heartbeats": self.requests.get("heartbeat", 0) * HEARTBEAT_BYTES,
            "sockets": self.sockets * SOCKET_BYTES,
            "join": JOIN_BYTES,
            "app": self.beside.get("app", 0),
            "again": self.beside["again"],
        }

    def deviation(self) -> float:
        """Return the socket's deviation from messages and terms, as a fraction of the messages."""
        expected = self.wire_bytes + sum(self.terms().values())
        return (self.socket_bytes - expected) / self.wire_bytes


def books_of(tapped: Tapped) -> NodeBooks:
    """Sort a node's traffic by purpose."""
    beside: Counter[str] = Counter()
    requests: Counter[str] = Counter()
    up = down = messages_up = messages_down = 0
    node_id = ""
    seen: set[tuple[str, bytes]] = set()
    for exchange in tapped.exchanges():
        purpose, content = _read(exchange)
        if purpose in ("up", "down") and exchange.path != f"{_FLEET}pull-messages":
            asked = (exchange.path, exchange.body)
            if asked in seen:
                purpose, content = "again", b""
            seen.add(asked)
        requests[purpose] += 1
        beside[purpose] += exchange.up_bytes + exchange.down_bytes - len(content)
        up += len(content) if purpose == "up" else 0
        down += len(content) if purpose == "down" else 0
        if exchange.path == f"{_FLEET}activate-node":
            node_id = str(ActivateNodeResponse.FromString(exchange.answer).node_id)
        if content.startswith(b"Message "):  # the root of its tree of objects
            messages_up += purpose == "up"
            messages_down += purpose == "down"
    exchanged = sum(one.up_bytes + one.down_bytes for one in tapped.exchanges())
    opened = sum(len(one.asked) + len(one.answered) for one in tapped.connections)
    beside["again"] += opened - exchanged
    return NodeBooks(
        node_id=node_id,
        up_bytes=tapped.up_bytes,
        down_bytes=tapped.down_bytes,
        messages_up_bytes=up,
        messages_down_bytes=down,
        messages_up=messages_up,
        messages_down=messages_down,
        beside=dict(beside),
        requests=dict(requests),
        sealing_bytes=tapped.up_bytes + tapped.down_bytes - opened,
        sockets=tapped.sockets,
    )


def _read(exchange: Exchange) -> tuple[str, bytes]:
    """Return a request's purpose, and the part of a message that went with it."""
    name = exchange.path.removeprefix(_FLEET)
    if name == "pull-messages":
        listed = PullMessagesResponse.FromString(exchange.answer).messages_list
        return ("down" if listed else "poll"), b""
    if name == "pull-object":
        content = PullObjectResponse.FromString(exchange.answer).object_content
        return ("down" if content else "poll"), content
    if name == "push-object":
        return "up", PushObjectRequest.FromString(exchange.body).object_content
    return _PURPOSES[name], b""


def compare(nodes: Mapping[str, NodeBooks], communication: Mapping[str, Any]) -> dict[str, Any]:
    """Hold the proxies' books against the ledger's."""
    wire = sum(node.wire_bytes for node in nodes.values())
    terms: Counter[str] = Counter()
    for node in nodes.values():
        terms.update(node.terms())
    on_sockets = sum(node.socket_bytes for node in nodes.values())
    return {
        "ledger_wire_bytes": communication["wire_bytes"],
        "messages_bytes": wire,
        "messages": sum(node.messages_up + node.messages_down for node in nodes.values()),
        "ledger_messages": communication["messages"],
        "socket_bytes": on_sockets,
        "terms": dict(terms),
        "deviation": (on_sockets - wire - sum(terms.values())) / wire,
        "nodes": {
            name: vars(node) | {"deviation": node.deviation()} for name, node in nodes.items()
        },
    }


def holds(found: Mapping[str, Any]) -> bool:
    """Tell whether the messages agree to the byte, and all that travels as law 9 says."""
    return bool(
        found["messages_bytes"] == found["ledger_wire_bytes"]
        and found["messages"] == found["ledger_messages"]
        and abs(found["deviation"]) <= TOLERANCE
    )


def run_tapped(real: RealNodes, names: list[str], *, limit_seconds: float) -> dict[str, NodeBooks]:
    """Run a deployment once, each node behind a proxy.

    Raises:
        RuntimeError: The run failed.
    """
    with Wiretap(real.folder / "server", real.port) as tap:
        real.start_server()
        real.register()
        for name in names:
            real.start_node(name, "--superlink", f"127.0.0.1:{tap.tap(name)}")
        done = real.run(limit_seconds=limit_seconds)
        for name in names:
            real.stop(name)
        if done.returncode:
            raise RuntimeError(f"the run failed:\n{(done.stdout + done.stderr)[-4000:]}")
    return {name: books_of(tapped) for name, tapped in tap.nodes.items()}


def measure(rounds: int, folder: Path) -> dict[str, Any]:
    """Run the default job on three nodes and compare."""
    experiment = Experiment.from_file(
        EXPERIMENT,
        [
            f"strategy.num-rounds={rounds}",
            f"strategy.evaluate-every={rounds}",
            "data.max-eval-rows=64",
            f"run.out='{folder}/simulated'",
            f"run.cache='{folder}/cache'",
        ],
    )
    films = count_clients(experiment.data, experiment.clients, cache=folder / "cache").num_rows
    several = {"client_column": "film", "clients_per_node": len(films), "clients": len(films)}
    deployment = loopback_deployment(experiment, NODES, **several)
    write_deployment(deployment, folder / "deployment")
    write_thirds(folder / "deployment" / "nodes", experiment)
    with RealNodes(folder / "deployment", deployment.port) as real:
        nodes = run_tapped(real, list(NODES), limit_seconds=RUN_SECONDS)
        result = real.result(f"{experiment.run.name}-1")
    return {
        "rounds": rounds,
        **compare(nodes, result["communication"]),
        "communication": result["communication"],
        "versions": versions(),
        "machine": machine(),
    }


def main() -> None:
    """Measure, print, keep where asked; exits with 1 if the ledger is not true."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the measurement to this JSON file")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fedpet-books-"))
    try:
        found = measure(arguments.rounds, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(found, indent=2))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    sys.exit(0 if holds(found) else 1)


if __name__ == "__main__":
    main()
