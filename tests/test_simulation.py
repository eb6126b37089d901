"""The same run on Ray, through the command line and through `flwr run`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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


def test_flwr_run_gives_the_same_bytes_as_simulate(
    files: tuple[Path, Path], tmp_path: Path, repository: Path
) -> None:
    simulated, _ = simulate(tiny.make_experiment(*files, tmp_path / "simulated"), Silent())
    out = tmp_path / "flower"
    keys = tiny.make_experiment(*files, out).to_run_config()
    config = " ".join(f"{key}={json.dumps(value)}" for key, value in keys.items())
    flwr = Path(sys.executable).parent / "flwr"
    done = subprocess.run(
        [
            str(flwr), "run", str(repository), "local", "--stream", "--run-config", config,
            "--federation-config",
            "num-supernodes=2 client-resources-num-cpus=1 init-args-num-cpus=2",
        ],
        env=os.environ | {"PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )  # fmt: skip
    assert (out / "result.json").exists(), done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((out / "result.json").read_text())
    assert result["final_values_sha256"] == simulated["final_values_sha256"]
