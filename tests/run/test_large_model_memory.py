"""A checkpoint goes through mask, step, merge and writing in 1.3 times its size in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="memory is read off /proc"),
]
JOB = Path(__file__).resolve().parents[1] / "helpers" / "memory_job.py"


def _job(*arguments: object) -> str:
    command = [sys.executable, str(JOB), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(("dtype", "shared"), [("float32", False), ("bfloat16", True)])
def test_no_stage_holds_a_second_copy_of_the_checkpoint(
    tmp_path: Path, dtype: str, shared: bool
) -> None:
    folder = tmp_path / "small"
    _job("write", folder, dtype)
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert size > 200e6
    peaks: dict[str, int] = json.loads(_job("read", folder, dtype, shared).splitlines()[-1])
    own, before = peaks.pop("own"), peaks.pop("before")
    assert own < 0.35 * size if shared else own > 0.8 * size
    over = {stage: (peak - before) / size for stage, peak in peaks.items()}
    assert max(over.values()) <= 1.3, over
