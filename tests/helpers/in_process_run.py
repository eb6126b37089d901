"""Whole runs of a small experiment, on nodes in this process: real model, strategy and frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tiny import Silent

from fedpet.client.node_config import NodeConfig
from fedpet.config import Experiment
from fedpet.run.federate import federate, prepare
from fedpet.run.local_grid import LocalGrid
from fedpet.run.run_folder import new_run_folder

Handler = Callable[[bytes], bytes]


def run(experiment: Experiment, grid: LocalGrid | None = None, nodes: int = 1) -> dict[str, Any]:
    grid = grid or LocalGrid.of(NodeConfig.simulated(experiment), nodes)
    return federate(grid, prepare(experiment, Silent()), new_run_folder(experiment), Silent())
