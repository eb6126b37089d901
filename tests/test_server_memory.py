"""What the server holds does not grow with the number of clients, but for their encoded frames."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(600)
def test_memory_at_20_and_at_200_clients_a_round_differs_by_less_than_50_mb(
    tmp_path: Path, repository: Path
) -> None:
    out = tmp_path / "memory.json"
    command = [sys.executable, "-m", "simulations.benchmarks.server_memory", "--out", str(out)]
    command += ["--strategies", "fedadam", "--codecs", "float32"]  # the longest frames there are
    subprocess.run(command, check=True, capture_output=True, timeout=580, cwd=repository)
    [row] = json.loads(out.read_text())["rows"]
    assert 0 < row["added_mb"]["200"] < 50
