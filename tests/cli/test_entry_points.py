"""One experiment by each way in: the installed command in an empty folder, and `flwr run`."""

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

import pytest
import tiny
import tomli_w
from installed_wheel import build_wheel, install_wheel

from fedpet.config import Experiment

pytestmark = [pytest.mark.simulation, pytest.mark.timeout(300)]

LIMIT_SECONDS = 200
BINARIES = Path(sys.executable).parent


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    folder = tmp_path_factory.mktemp("tiny")
    backbone, rows = tiny.make_backbone(folder / "backbone"), tiny.make_rows(folder / "rows")
    changes = {"strategy_num_rounds": 2, "run_workers": 1}
    return tiny.make_experiment(backbone, rows, folder / "run", **changes)


@pytest.fixture(scope="module")
def simulated(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of `fedpet simulate`, from the wheel, where there is nothing but an experiment."""
    folder = tmp_path_factory.mktemp("wheel")
    binaries = install_wheel(build_wheel(folder), folder / "venv")
    empty = folder / "empty"
    empty.mkdir()
    (folder / "tiny.toml").write_text(tomli_w.dumps(experiment.to_tables()), encoding="utf-8")
    command = [binaries / "fedpet", "simulate", folder / "tiny.toml", "--out", empty / "run"]
    done = run(command, cwd=empty)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.name for path in empty.iterdir()] == ["run"]
    return read_result(empty / "run")


@pytest.fixture(scope="module")
def superlink() -> Iterator[None]:
    """The local SuperLink that `flwr run` looks for. It would start one, and give it 15 seconds."""
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


def test_the_wheel_simulates_in_an_empty_folder(simulated: dict[str, Any]) -> None:
    assert simulated["run"]["status"] == "ok"
    assert len(simulated["quality"]["by_round"]) >= 2


def test_flwr_run_gives_the_same_values_as_the_command(
    experiment: Experiment,
    simulated: dict[str, Any],
    superlink: None,
    repository: Path,
    tmp_path: Path,
) -> None:
    app = tmp_path / "app"
    for name in ("fedpet", "strategies", "simulations"):
        shutil.copytree(repository / name, app / name)
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(repository / name, app / name)
    out = tmp_path / "run"
    changed = tomli_w.dumps(experiment.to_run_config() | {"run-out": str(out)})
    (tmp_path / "tiny.toml").write_text(changed, encoding="utf-8")

    size = "num-supernodes=2 client-resources-num-cpus=1 init-args-num-cpus=1"
    settings = ["--run-config", tmp_path / "tiny.toml", "--federation-config", size]
    done = run([BINARIES / "flwr", "run", app, "local", "--stream", *settings], cwd=tmp_path)

    assert (out / "result.json").exists(), (done.stdout + done.stderr)[-3000:]
    assert read_result(out)["final_values_sha256"] == simulated["final_values_sha256"]


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
