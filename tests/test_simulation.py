"""The same run on Ray, whatever the number of workers."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from fedpet.simulations.engine import simulate

pytestmark = [pytest.mark.simulation, pytest.mark.timeout(300)]


class Silent:
    def say(self, text: str) -> None: ...
    def round_done(self, record: object, ledger: object) -> None: ...


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return tiny.make_backbone(folder / "backbone"), tiny.make_rows(folder / "rows")


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
