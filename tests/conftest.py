"""Give every test settings of its own: nothing of the user's, nothing left behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from fedpet.config import Experiment

REPOSITORY = Path(__file__).resolve().parents[1]
# Benchmarks are in no wheel: they are taken from the checkout. At the end of the path, so that a
# wheel's fedpet stays the one that is tested.
sys.path.append(str(REPOSITORY))

# How long an example takes, or its making, tells of what else the machine does, not of the code.
settings.register_profile("fedpet", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fedpet")

# Short on purpose: Ray puts sockets below it, and the path of a socket holds 107 bytes.
HOME = Path(tempfile.mkdtemp(prefix="fp-"))


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


HTTP_PORT, CONTROL_PORT = free_ports(2)
STACK = contextlib.ExitStack()  # until the tests are over

# Here and not in a fixture: Flower, Ray and the hub's client read these when they are imported.
os.environ |= {
    "FEDPET_CACHE": str(HOME / "cache"),
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": str(HOME / "hub"),
    "OMP_NUM_THREADS": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_HOME": str(HOME / "flwr"),
    # A local SuperLink stays after `flwr run` and serves whoever asks on its port: not the user's.
    "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(HTTP_PORT),
    "FLWR_LOCAL_CONTROL_API_PORT": str(CONTROL_PORT),
    "RAY_TMPDIR": str(HOME),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # Ray's workers are nice, and beside other work would stand still
    "TOKENIZERS_PARALLELISM": "false",
}
os.environ.pop("RAY_ADDRESS", None)

# A run waits some thirty times for the disk, and no test of this process cuts the power.
os.fsync = lambda handle: None


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Nodes and server set torch's threads for the process, which has more tests: one, as above."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout's root: the tests come from it even where the package does not."""
    return REPOSITORY


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny backbone, and the folder of a few rows with clients."""
    import tiny  # here, after the settings above

    folder = tmp_path_factory.mktemp("tiny")
    return tiny.make_backbone(folder / "backbone"), tiny.make_rows(folder / "rows")


@pytest.fixture
def experiment(files: tuple[Path, Path], tmp_path: Path) -> Callable[..., Experiment]:
    """Makes experiments over those files, each with a run folder of its own."""
    import tiny

    counter = iter(range(100))

    def make(**changes: Any) -> Experiment:
        return tiny.make_experiment(*files, tmp_path / f"run{next(counter)}", **changes)

    return make


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Run fedpet in an empty folder; give its exit code, what it said and what it printed."""
    from fedpet.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedpet", *arguments])
        code: Any = 0
        try:
            main.main()
        except SystemExit as ended:
            code = ended.code or 0
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.err, captured.out

    return run


@pytest.fixture
def refused(command: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """Run a command that must end with exit code 2 and one message; give the message."""

    def run(*arguments: str, code: int = 2) -> str:
        found, said, _ = command(*arguments)
        assert found == code
        assert not Path("runs").exists(), "nothing is left behind"
        [line] = [line for line in said.splitlines() if line.startswith("Error: ")]
        return line

    return run


def pytest_collection_finish() -> None:
    """Flower collects garbage in every round, and would go through all that was imported."""
    from fedpet.utils.gc_paused import kept_from_collection

    STACK.enter_context(kept_from_collection())


def pytest_unconfigure() -> None:
    STACK.close()
    shutil.rmtree(HOME, ignore_errors=True)
