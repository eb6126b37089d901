"""Test that the server's memory does not grow with the number of clients."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(600)
def test_a_round_of_200_clients_takes_hardly_more_memory_than_one_of_20(
    tmp_path: Path, repository: Path
) -> None:
    out = tmp_path / "memory.json"
    command = [sys.executable, "-m", "benchmarks.server_memory", "--out", str(out)]
    command += ["--strategies", "fedadam", "--codecs", "float32"]  # the longest frames there are
    subprocess.run(command, check=True, capture_output=True, timeout=580, cwd=repository)
    found = json.loads(out.read_text())
    [row] = found["rows"]
    replies = (200 - 20) * 3 * found["values"] / 1e6  # MB, noise coded as short as it can be
    assert row["added_mb"]["200"] < 20 < replies
