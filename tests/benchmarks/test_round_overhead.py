"""The benchmark of a round without training sends frames as long as real ones."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import Silent

from benchmarks.noisy_rounds import noise_for_training
from fedpet.client.node_config import NodeConfig
from fedpet.run.federate import federate, prepare
from fedpet.run.local_grid import LocalGrid
from fedpet.run.run_folder import new_run_folder


def bytes_up(settings: Any) -> tuple[float, str]:
    grid = LocalGrid.of(NodeConfig.from_experiment(settings), 1)
    result = federate(grid, prepare(settings, Silent()), new_run_folder(settings), Silent())
    return (
        result["communication"]["uplink_bytes_per_client_round"],
        result["final_values_sha256"],
    )


@pytest.mark.parametrize("codec", ["float32", "eden-2"])
def test_updates_of_noise_are_as_long_as_trained_ones_and_the_same_each_time(
    experiment: Any, codec: str, tmp_path: Any
) -> None:
    same = {"codec_uplink": codec, "mask_density": 0.5, "training_learning_rate": 0.01}
    trained, _ = bytes_up(experiment(**same, run_out=str(tmp_path / "trained")))
    idle = {**same, "training_local_epochs": 0}
    nothing, _ = bytes_up(experiment(**idle, run_out=str(tmp_path / "nothing")))
    with noise_for_training():
        first = bytes_up(experiment(**idle, run_out=str(tmp_path / "first")))
        second = bytes_up(experiment(**idle, run_out=str(tmp_path / "second")))
    assert first == second
    assert nothing < 0.7 * first[0]
    assert first[0] == pytest.approx(trained, rel=0.1)
    assert bytes_up(experiment(**idle, run_out=str(tmp_path / "after")))[0] == nothing
