"""Run a deployment's processes on this machine, from the scripts of `fedpet deploy`.

Server and nodes listen on the loopback. Every process is ended by its id, with its children, when
the block is left.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedpet.config import Experiment
    from fedpet.deploy import Deployment

START_SECONDS = 300.0  # of a server, on a machine that is busy
STOP_SECONDS = 15.0
# A disk of so many MiB on a folder, for one process and its children; then the command.
_ON_A_DISK = (
    *("unshare", "--user", "--map-root-user", "--mount", "bash", "-c"),
    'mount -t tmpfs -o "size=$0m" fedpet "$1" && shift && exec "$@"',
)


class RealNodes:
    """Server and nodes of one deployment folder.

    Args:
        folder: Made by `fedpet.deploy.write_deployment`, with the address 127.0.0.1.
        port: The server's.
        environment: Set beside this process's own.
    """

    def __init__(self, folder: Path, port: int, environment: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.port = port
        binaries = str(Path(sys.executable).parent)
        self._environment = {
            **os.environ,
            "PATH": os.pathsep.join([binaries, os.environ["PATH"]]),
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            **(environment or {}),
        }
        self._environment.pop("PYTHONPATH", None)  # the app brings its own fedpet
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> RealNodes:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name in reversed(list(self._processes)):
            self.stop(name)

    def start_server(self) -> None:
        """Start the SuperLink and wait until it answers."""
        process = self._start("server", str(self.folder / "server" / "superlink.sh"))
        context = ssl.create_default_context(cafile=str(self.folder / "server" / "ca.crt"))
        limit = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError):
                url = f"https://127.0.0.1:{self.port}/health"
                urllib.request.urlopen(url, timeout=2, context=context).close()
                return
            if process.poll() is not None or time.monotonic() > limit:
                raise RuntimeError(f"the server did not start:\n{self.log('server')[-3000:]}")
            time.sleep(0.3)

    def register(self) -> None:
        """Let the nodes in."""
        done = self.call(self.folder / "server" / "register.sh")
        if done.returncode:
            raise RuntimeError(f"the nodes were not registered:\n{done.stdout}{done.stderr}")

    def start_node(
        self, name: str, *arguments: str, disk_mib: int = 0, **environment: str
    ) -> subprocess.Popen[bytes]:
        """Start a SuperNode; it may take seconds until it is there.

        Args:
            name: Of its folder.
            arguments: To `flower-supernode`, after its own.
            disk_mib: Size of a disk of its own below its cache, see `fill_disk`; 0 for none.
            environment: Set for it alone.
        """
        script = self.folder / "nodes" / name / "supernode.sh"
        disk = [*_ON_A_DISK, str(disk_mib), str(self._cache(name))] if disk_mib else []
        return self._start(name, *disk, str(script), *arguments, **environment)

    def fill_disk(self, name: str) -> None:
        """Fill the disk that a node was started with: what it writes then fails, by ENOSPC."""
        with contextlib.suppress(OSError), self._ballast(name).open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def empty_disk(self, name: str) -> None:
        """Make room again."""
        self._ballast(name).unlink()

    def _ballast(self, name: str) -> Path:
        inside = Path(f"/proc/{self._processes[name].pid}/root")  # mounted for the node alone
        return inside / self._cache(name).relative_to("/") / "ballast"

    def _cache(self, name: str) -> Path:
        cache = (self.folder / "nodes" / name / "cache").resolve()
        cache.mkdir(exist_ok=True)
        return cache

    def keep_node(self, name: str, until: Callable[[], bool]) -> int:
        """Start a node again and again where it ends, as its systemd unit does.

        Args:
            name: Of a node that does not run.
            until: Tells when it is there to stay.

        Returns:
            How often it was started.
        """
        unit = (self.folder / "nodes" / name / "fedpet-supernode.service").read_text("utf-8")
        [pause] = [line for line in unit.splitlines() if line.startswith("RestartSec=")]
        starts = 0
        while not until():
            time.sleep(float(pause.partition("=")[2]))
            process, starts = self.start_node(name), starts + 1
            while process.poll() is None and not until():
                time.sleep(0.2)
        return starts

    def run(
        self,
        *overrides: str,
        limit_seconds: float,
        meanwhile: Callable[[], None] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run the app to its end.

        Args:
            overrides: Of the run config, "key=value".
            limit_seconds: After which it counts as hung: `RuntimeError`.
            meanwhile: Called once the run has been submitted.
        """
        if meanwhile is not None:
            thread = threading.Thread(target=meanwhile, daemon=True)
            thread.start()
        settings = [part for text in overrides for part in ("--run-config", text)]
        script = self.folder / "server" / "run.sh"
        done = self.call(script, *settings, limit_seconds=limit_seconds)
        if meanwhile is not None:
            thread.join(STOP_SECONDS)
        return done

    def call(
        self, *command: str | Path, limit_seconds: float = START_SECONDS
    ) -> subprocess.CompletedProcess[str]:
        """Call a command and wait for its end.

        Raises:
            RuntimeError: It did not end in time, and was ended with what it had started.
        """
        arguments = [str(part) for part in command]
        pipe = subprocess.PIPE
        with subprocess.Popen(
            arguments, env=self._environment, stdout=pipe, stderr=pipe, text=True
        ) as process:
            try:
                said, complained = process.communicate(timeout=limit_seconds)
            except BaseException as error:
                _kill([process.pid, *descendants(process.pid)])
                said, complained = process.communicate()
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                raise RuntimeError(
                    f"{Path(arguments[0]).name} did not end within {limit_seconds:g} seconds:\n"
                    f"{said[-3000:]}{complained[-3000:]}"
                ) from None
        return subprocess.CompletedProcess(arguments, process.returncode, said, complained)

    def result(self, run: str) -> dict[str, Any]:
        """Read the `result.json` of a run below the server's folder."""
        path = self.folder / "server" / "runs" / run / "result.json"
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return result

    def rounds(self, run: str) -> list[dict[str, Any]]:
        """Read the lines that a run has written so far."""
        path = self.folder / "server" / "runs" / run / "rounds.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def log(self, name: str) -> str:
        """Read the log of the server or a node so far."""
        return (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def kill(self, name: str) -> None:
        """End a process at once, with what it has started, as a power cut does."""
        process = self._processes.pop(name)
        _kill([process.pid, *descendants(process.pid)])
        process.wait()

    def stop(self, name: str) -> None:
        """End a process, at first by asking."""
        process = self._processes.pop(name)
        started = descendants(process.pid)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        _kill(pid for pid, born in started.items() if _born(pid) == born)  # still the same
        process.kill()
        process.wait()

    def _start(self, name: str, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                command,
                env=self._environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self._processes[name]


def loopback_deployment(experiment: Experiment, names: Iterable[str], **more: Any) -> Deployment:
    """Return a deployment on this machine alone, at ports that are free now.

    Args:
        experiment: What to run.
        names: Of the nodes.
        more: Fields of `Deployment` beside those.
    """
    from fedpet.deploy import Deployment, NodeSpec

    nodes = tuple(NodeSpec(name) for name in names)
    port, own_port, _, node_port, *_ = free_ports(3 + len(nodes))  # the monitor's is above its own
    more |= {"port": port, "own_port": own_port, "node_port": node_port}
    return Deployment(
        experiment=experiment, nodes=nodes, host="127.0.0.1", bind="127.0.0.1", **more
    )


def can_mount() -> bool:
    """Tell whether a node can be given a disk of its own here."""
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(OSError):
        done = subprocess.run([*_ON_A_DISK, "1", folder, "true"], capture_output=True, check=False)
        return done.returncode == 0
    return False


def free_ports(count: int) -> list[int]:
    """Neighbouring ports of the loopback that nobody listens on now.

    Below those that Linux gives to connections, and drawn: another call may look for some as well.
    """
    for _ in range(1000):
        first = random.SystemRandom().randrange(20000, 32768 - count)
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return list(range(first, first + count))
    raise RuntimeError(f"no {count} neighbouring ports are free")


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> dict[int, str]:
    """Return a process's descendants, each with the time of its start."""
    children: dict[int, list[int]] = {}
    for entry in _all_processes():
        parent = _field(entry, 1)
        if parent:
            children.setdefault(int(parent), []).append(entry)
    found: dict[int, str] = {}
    waiting = list(children.get(pid, []))
    while waiting:
        one = waiting.pop()
        found[one] = _born(one)
        waiting += children.get(one, [])
    return found


def _all_processes() -> Iterator[int]:
    return (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())


def _born(pid: int) -> str:
    return _field(pid, 19)


def _field(pid: int, index: int) -> str:
    """Return a field of /proc/PID/stat behind the command's name; "" for a dead process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[index]


def plain_http_is_refused(port: int) -> bool:
    """Tell whether the server refuses plain HTTP."""
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10).close()
    except urllib.error.HTTPError:
        return False  # it spoke HTTP
    except OSError:
        return True
    return False
