"""Runs whose clients come with their nodes: an experiment, nodes with their own files, books."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_public_key,
)
from in_process_run import Handler, run

from fedpet.client.node import Node
from fedpet.client.node_config import NodeConfig
from fedpet.config import Experiment
from fedpet.deploy.certificates import make_node_key
from fedpet.protocol.request import read_request
from fedpet.run.local_grid import LocalGrid


def on_nodes(experiment: Callable[..., Experiment], **changes: Any) -> Experiment:
    """The experiment with its clients on the nodes; the server's folder holds test rows only."""
    settings = experiment(
        clients_partition="nodes",
        **{"clients_num_clients": 6, "strategy_node_wait_seconds": 5.0, **changes},
    )
    server = Path(settings.run.out).parent / "server"
    server.mkdir(exist_ok=True)
    shutil.copy(Path(settings.data.source) / "test.jsonl", server)
    return replace(settings, data=replace(settings.data, source=str(server)))


def node_of(settings: Experiment, rows: Path, clients: list[str], **config: Any) -> Handler:
    """A node whose own file holds the training rows of these clients, in the order of the whole."""
    lines = (rows / "train.jsonl").read_text(encoding="utf-8").splitlines()
    own = [line for line in lines if json.loads(line)["client"] in clients]
    name = "-".join(clients).replace(" ", "")
    folder = Path(settings.run.out).parent / f"node-{name}"
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("\n".join(own) + "\n", encoding="utf-8")
    node_config = {"data": str(folder / "rows.jsonl"), "cache": str(folder / "cache"), **config}
    return Node(NodeConfig.from_experiment(settings, node_config)).answer


def three_nodes(settings: Experiment, rows: Path) -> dict[int, Handler]:
    homes = {7: ["client 0", "client 4"], 5: ["client 1", "client 2"], 9: ["client 3", "client 5"]}
    return {node: node_of(settings, rows, clients) for node, clients in homes.items()}


def simulated(experiment: Experiment) -> dict[str, Any]:
    return run(experiment, LocalGrid.of(NodeConfig.from_experiment(experiment), 2))


def lines_of(settings: Experiment) -> list[dict[str, Any]]:
    text = (Path(settings.run.out) / "rounds.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def put_key(folder: Path, name: str, bounds: str = "") -> bytes:
    """Make a node's files; its key as Flower has it."""
    folder.mkdir(exist_ok=True)
    public = make_node_key()[1]
    (folder / f"{name}.pub").write_bytes(public)
    if bounds:
        (folder / f"{name}.toml").write_text(bounds)
    return load_ssh_public_key(public).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def meanwhile(honest: Handler, events: dict[int, Callable[[], object]]) -> Handler:
    """A node at which something happens before it answers its train message of this number."""
    count = 0

    def answer(payload: bytes) -> bytes:
        nonlocal count
        if read_request(payload).clients:
            count += 1
            events.get(count, lambda: None)()
        return honest(payload)

    return answer


def rows_of(settings: Experiment, client: str) -> Path:
    name = client.replace(" ", "")
    return Path(settings.run.out).parent / f"node-{name}" / "rows.jsonl"


def write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
