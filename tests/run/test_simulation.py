"""The same run on Ray, whatever the number of workers."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from tiny import Silent

from fedpet.run.ray_engine import simulate

pytestmark = [pytest.mark.simulation, pytest.mark.timeout(300)]


def test_one_and_two_ray_workers_give_the_same_bytes(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    hashes = set()
    for workers in (1, 2):
        out = tmp_path / f"workers{workers}"
        result, folder = simulate(tiny.make_experiment(*files, out, run_workers=workers), Silent())
        hashes.add(result["final_values_sha256"])
        assert {p.name for p in folder.path.iterdir()} >= {
            "config.toml",
            "rounds.jsonl",
            "result.json",
            "plan.bin",
            "structure.json",
            "checkpoint",
            "model",
        }
    assert len(hashes) == 1
