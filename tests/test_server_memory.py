"""What the server holds does not grow with the number of clients, but for their encoded frames."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(600)
def test_more_clients_a_round_add_their_encoded_replies_and_nothing_else(
    tmp_path: Path, repository: Path
) -> None:
    out = tmp_path / "memory.json"
    command = [sys.executable, "-m", "simulations.benchmarks.server_memory", "--out", str(out)]
    command += ["--strategies", "fedadam", "--codecs", "float32"]  # the longest frames there are
    subprocess.run(command, check=True, capture_output=True, timeout=580, cwd=repository)
    found = json.loads(out.read_text())
    [row] = found["rows"]
    replies = (200 - 20) * 4 * found["values"] / 1e6  # MB, if noise could not be coded shorter
    assert 0 < row["added_mb"]["200"] < replies
