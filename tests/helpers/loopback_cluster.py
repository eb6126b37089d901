"""A Ray cluster of raylets on the loopback, each with a home and a cache of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from benchmarks.real_nodes import free_ports

RAY = str(Path(sys.executable).parent / "ray")


class LoopbackCluster:
    """Starts raylets that stand in for machines.

    Args:
        folder: Holds a home and a cache for each machine.
        temporary: Short, for the paths of Ray's sockets.
    """

    def __init__(self, folder: Path, temporary: Path) -> None:
        [port] = free_ports(1)
        self.address, self._folder = f"127.0.0.1:{port}", folder
        self._raylets: dict[str, subprocess.Popen[bytes]] = {}
        self._temporary = temporary
        head = ["--head", f"--port={port}", f"--temp-dir={temporary}", "--include-dashboard=false"]
        self._start("head", 0, head)

    def add(self, name: str, cpus: int = 1) -> None:
        """Start a machine."""
        self._start(name, cpus, [f"--address={self.address}"])

    def cache(self, name: str) -> Path:
        return self._folder / name / "cache"

    def home(self, name: str) -> Path:
        return self._folder / name / "home"

    def kill(self, name: str) -> None:
        """Kill a machine: its raylet with all workers, at once."""
        top = psutil.Process(self._raylets[name].pid)
        for process in [top, *top.children(recursive=True)]:
            process.send_signal(signal.SIGKILL)
        self._raylets.pop(name).wait()

    def shutdown(self) -> None:
        for name in [*self._raylets][::-1]:
            self.kill(name)

    def _start(self, name: str, cpus: int, options: list[str]) -> None:
        self.home(name).mkdir(parents=True)
        environment = {
            **os.environ,
            "HOME": str(self.home(name)),
            "FEDPET_CACHE": str(self.cache(name)),
            "RAY_raylet_start_wait_time_s": "60",
            "PYTHONUNBUFFERED": "1",
        }
        common = ["--node-ip-address=127.0.0.1", f"--num-cpus={cpus}", "--num-gpus=0", "--block"]
        common += ["--object-store-memory=100000000", "--disable-usage-stats"]
        with (self._folder / f"{name}.log").open("wb") as log:
            self._raylets[name] = subprocess.Popen(
                [RAY, "start", *options, *common], env=environment, stdout=log, stderr=log
            )
        self._await(name)

    def _await(self, name: str) -> None:
        log, until = self._folder / f"{name}.log", time.monotonic() + 90
        while "Ray runtime started" not in log.read_text():
            assert self._raylets[name].poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.2)
