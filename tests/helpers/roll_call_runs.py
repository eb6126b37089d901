"""Runs whose clients come with their nodes: an experiment, nodes with their own files, books."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from in_process_run import Handler, run

from fedpet.client.node import Node
from fedpet.client.node_config import NodeConfig
from fedpet.config import Experiment
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
