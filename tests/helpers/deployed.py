"""A deployment of the tiny model: real processes on this machine, and what they must come to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny
from tiny import Silent

from fedpet.client.node import Node
from fedpet.client.node_config import NodeConfig
from fedpet.config import Experiment
from fedpet.deploy import write_deployment
from fedpet.run.federate import federate, prepare
from fedpet.run.local_grid import LocalGrid
from fedpet.run.run_folder import new_run_folder


class Place:
    """A deployment of the tiny model: one client a node, of the node's name."""

    def __init__(self, files: tuple[Path, Path], folder: Path, names: list[str]) -> None:
        self.names = names
        self.backbone, self.rows = files
        self.folder = folder
        self.evaluation = folder / "evaluation"
        self.evaluation.mkdir()
        shutil.copy(self.rows / "test.jsonl", self.evaluation)

    def experiment(self, name: str, **changes: Any) -> Experiment:
        settings = tiny.make_experiment(
            self.backbone, self.rows, self.folder / name, strategy_clients_per_round=9, **changes
        )
        return replace(settings, data=replace(settings.data, source=str(self.evaluation)))

    def write_rows(self, path: Path, number: int) -> None:
        lines = (self.rows / "train.jsonl").read_text(encoding="utf-8").splitlines()
        own = [line for line in lines if json.loads(line)["client"] == f"client {number}"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(own) + "\n", encoding="utf-8")

    def deploy(
        self,
        clients: int,
        *,
        isolation: str = "process",
        bounds: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Any:
        from benchmarks.real_nodes import RealNodes, loopback_deployment

        more = {"clients": clients, "isolation": isolation, **(bounds or {})}
        deployment = loopback_deployment(self.experiment("real", **changes), self.names, **more)
        write_deployment(deployment, self.folder / "deployment")
        for number, name in enumerate(self.names):
            place = self.folder / "deployment" / "nodes" / name
            self.write_rows(place / "data.jsonl", number)
        return RealNodes(self.folder / "deployment", deployment.port)

    def expected(self, names: list[str], script: Path | None = None, **changes: Any) -> str:
        """The hash of a run with these nodes alone, all honest, in this process."""
        settings = self.experiment("expected" if script is None else "scripted", **changes)
        population = replace(settings.clients, partition="nodes", num_clients=len(names))
        settings = replace(settings, clients=population)
        handlers: dict[int, Callable[[bytes], bytes]] = {}
        for name in names:
            path = self.folder / "expected-nodes" / name / "data.jsonl"
            self.write_rows(path, self.names.index(name))
            config = {"data": str(path), "client": name}
            node = replace(NodeConfig.from_experiment(settings, config), script=script)
            handlers[len(handlers) + 1] = Node(node).answer
        prepared = prepare(settings, Silent())
        result = federate(LocalGrid(handlers), prepared, new_run_folder(settings), Silent())
        return str(result["final_values_sha256"])
