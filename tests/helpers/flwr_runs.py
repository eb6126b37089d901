"""Run the Flower app of a checkout by `flwr run`, on a SuperLink of this machine."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

import tomli_w

from fedpet.config import Experiment

BINARIES = Path(sys.executable).parent
LIMIT_SECONDS = 200


@contextlib.contextmanager
def local_superlink() -> Iterator[None]:
    """Start the SuperLink that `flwr run` looks for. It would start one, and give it 15 seconds."""
    port = os.environ["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"]
    control = f"127.0.0.1:{os.environ['FLWR_LOCAL_CONTROL_API_PORT']}"
    command = [str(BINARIES / "flower-superlink"), "--insecure", "--simulation"]
    command += ["--isolation", "subprocess", "--control-api-address", control]
    command += ["--host", "127.0.0.1", "--port", port]
    with subprocess.Popen(command, env=environment(), stdout=DEVNULL, stderr=DEVNULL) as process:
        try:
            for _ in range(LIMIT_SECONDS):
                assert process.poll() is None, "the SuperLink ended by itself"
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                    break
                time.sleep(0.5)
            yield
        finally:
            process.terminate()


def copy_app(repository: Path, app: Path) -> Path:
    for name in ("fedpet", "strategies", "simulations"):
        shutil.copytree(repository / name, app / name)
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(repository / name, app / name)
    return app


def flwr_run(app: Path, experiment: Experiment, folder: Path) -> dict[str, Any]:
    """Run the app; return the result."""
    out = folder / "run"
    changed = tomli_w.dumps(experiment.to_run_config() | {"run-out": str(out)})
    (folder / "tiny.toml").write_text(changed, encoding="utf-8")

    size = "num-supernodes=2 client-resources-num-cpus=1 init-args-num-cpus=1"
    settings = ["--run-config", folder / "tiny.toml", "--federation-config", size]
    done = run([BINARIES / "flwr", "run", app, "local", "--stream", *settings], cwd=folder)

    assert (out / "result.json").exists(), (done.stdout + done.stderr)[-3000:]
    return read_result(out)


def environment() -> dict[str, str]:
    """This process's, with its commands on the path: Flower starts some by name."""
    return os.environ | {"PATH": os.pathsep.join([str(BINARIES), os.environ["PATH"]])}


def run(command: list[Any], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )


def read_result(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return result
