"""Workers of Ray, other processes, train by a loss and a data collator of one's own."""

from __future__ import annotations

from pathlib import Path

import foreign_functions
import pytest
import tiny
from tiny import Silent

from fedpet.client.node import Node
from fedpet.client.node_config import NodeConfig
from fedpet.run.federate import federate, prepare
from fedpet.run.local_grid import LocalGrid
from fedpet.run.ray_engine import simulate
from fedpet.run.run_folder import new_run_folder

pytestmark = [pytest.mark.simulation, pytest.mark.timeout(300)]


def test_workers_import_a_loss_and_a_collator_that_the_run_s_process_registered_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helpers = str(Path(foreign_functions.__file__).parent)
    monkeypatch.setenv("PYTHONPATH", helpers, prepend=":")
    files = tiny.make_backbone(tmp_path / "b"), tiny.make_rows(tmp_path / "r")
    changes = {"training_loss": "focal", "data_collator": "four_tokens"}
    changes |= {"strategy_num_rounds": 1, "run_workers": 1}
    here = tiny.make_experiment(*files, tmp_path / "here", **changes)
    grid = LocalGrid({1: Node(NodeConfig.from_experiment(here)).answer})
    expected = federate(grid, prepare(here, Silent()), new_run_folder(here), Silent())
    found, _ = simulate(tiny.make_experiment(*files, tmp_path / "ray", **changes), Silent())
    assert found["refused"] == []
    assert found["final_values_sha256"] == expected["final_values_sha256"]
