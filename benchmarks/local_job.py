"""Run an experiment on one node in this process, and keep its result as one JSON file."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.cell import commit, write_json
from fedpet.client.node_config import NodeConfig
from fedpet.config import Experiment
from fedpet.protocol.flower_compat.flower_simulation import quiet_flower
from fedpet.run.callbacks import Callback
from fedpet.run.federate import federate
from fedpet.run.local_grid import LocalGrid
from fedpet.run.prepare import prepare
from fedpet.run.run_folder import machine, new_run_folder, versions

__all__ = ["run_local"]


def run_local(experiment: Experiment, command: str, out: Path) -> dict[str, Any]:
    """Run an experiment and write what came out.

    Args:
        experiment: What to run; its run folder is a temporary one.
        command: That runs it again, for the file.
        out: The file.
    """
    with tempfile.TemporaryDirectory() as folder, quiet_flower():
        settings = replace(experiment, run=replace(experiment.run, out=f"{folder}/run"))
        grid = LocalGrid.of(NodeConfig.from_experiment(settings), 1)
        result = federate(grid, prepare(settings, Callback()), new_run_folder(settings), Callback())
    kept = {name: result[name] for name in ("model", "data", "quality", "communication", "time")}
    tables = experiment.to_tables()
    tables["data"]["source"] = Path(experiment.data.source).name  # wherever it lies
    written = {
        "command": command,
        "settings": {name: tables[name] for name in tables if name not in ("run", "backbone")},
        **kept,
        "final_values_sha256": result["final_values_sha256"],
        "commit": commit(),
        "versions": versions(),
        "machine": machine(),
    }
    write_json(out, written)
    return result
