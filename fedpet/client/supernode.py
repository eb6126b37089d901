"""Run a node: Flower's SuperNode in this process, and a worker beside it that stays.

    python -m fedpet.client.supernode [--longest-poll SECONDS] [--idle-heartbeat SECONDS] ...

Other arguments are those of `flower-supernode`. A worker that ends, for memory say, is started
again after a pause that doubles while it keeps on ending; the SuperNode answers for the message
that it held. If this process ends, so does the worker: what starts this process, as systemd's unit
does, starts both again. The secret that lets the worker answer is drawn anew each time, on no disk.

Polling: within a run the server is asked every three seconds, as Flower does. After
`ACTIVE_SECONDS` without a message the pause grows by half each time, to the longest poll, and signs
of life come more rarely too. A server takes a node for gone after two that it missed: within a run
after a minute, of an idle node after ten.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

from fedpet.protocol.flower_compat.flower_supernode import run_supernode
from fedpet.utils.log_output import log_to_stderr

__all__ = ["LONGEST_POLL_SECONDS", "PollPause", "keep_running", "main"]

POLL_SECONDS = 3.0  # Flower's
LONGEST_POLL_SECONDS = 60.0
ACTIVE_SECONDS = 300.0
GROWTH = 1.5
HEARTBEAT_SECONDS, IDLE_HEARTBEAT_SECONDS = 30, 300  # the first is Flower's
FIRST_RESTART_SECONDS, LONGEST_RESTART_SECONDS = 1.0, 60.0
SETTLED_SECONDS = 60.0  # a worker that ran for so long is started again at once

LOG = logging.getLogger("fedpet")


class PollPause:
    """Tell how long to wait until the server is asked again.

    Args:
        longest: The longest pause, seconds.
        clock: Gives seconds.
        active: Seconds after a message in which the pause stays short.
    """

    def __init__(
        self,
        longest: float,
        clock: Callable[[], float] = time.monotonic,
        active: float = ACTIVE_SECONDS,
    ) -> None:
        self._longest = max(longest, POLL_SECONDS)
        self._active = active
        self._clock = clock
        self._last_message = clock()
        self._pause = POLL_SECONDS

    def __call__(self, came: bool) -> float:
        """Return the pause, seconds; `came` tells if a message has come since the last one."""
        now = self._clock()
        if came:
            self._last_message, self._pause = now, POLL_SECONDS
        elif now - self._last_message > self._active:
            self._pause = min(GROWTH * self._pause, self._longest)
        return self._pause


def keep_running(start: Callable[[], float], sleep: Callable[[float], object] = time.sleep) -> None:
    """Start a program again each time that it has ended.

    Args:
        start: Runs it to its end; returns the seconds that it ran.
        sleep: Waits for a number of seconds.
    """
    pause = FIRST_RESTART_SECONDS
    while True:
        if start() > SETTLED_SECONDS:
            pause = FIRST_RESTART_SECONDS
        sleep(pause)
        pause = min(2 * pause, LONGEST_RESTART_SECONDS)


def _run_worker(address: str, secret: bytes, script: str = "") -> float:
    """Run a worker to its end; return its seconds."""
    started = time.monotonic()
    command = [sys.executable, "-m", "fedpet.client.worker", address, *filter(None, [script])]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            process.stdin.write(secret.hex().encode() + b"\n")
            process.stdin.flush()
        status = process.wait()
    LOG.error("the worker ended with status %s; it is started again.", status)
    return time.monotonic() - started


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m fedpet.client.supernode",
        description="Run a node; other arguments go to flower-supernode.",
    )
    parser.add_argument(
        "--longest-poll",
        type=float,
        default=LONGEST_POLL_SECONDS,
        metavar="SECONDS",
        help="longest pause between questions to the server where nothing happens",
    )
    parser.add_argument(
        "--idle-heartbeat",
        type=int,
        default=IDLE_HEARTBEAT_SECONDS,
        metavar="SECONDS",
        help="between signs of life where nothing happens, at most 1800",
    )
    parser.add_argument(
        "--active-seconds",
        type=float,
        default=ACTIVE_SECONDS,
        metavar="SECONDS",
        help="after a message, in which the server is asked every three seconds",
    )
    parser.add_argument(
        "--script",
        default="",
        metavar="FILE",
        help="a Python file whose Trainer trains this node's clients, see fedpet.patch",
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8100)
    return parser.parse_known_args(arguments)


def main() -> None:
    """Run the node of this folder until it is ended."""
    log_to_stderr()
    options, flower = _parse(sys.argv[1:])
    secret = secrets.token_bytes(32)
    host = f"[{options.host}]" if ":" in options.host else options.host
    address = f"{host}:{options.port}"
    threading.Thread(
        target=keep_running,
        args=(lambda: _run_worker(address, secret, options.script),),
        daemon=True,
    ).start()
    run_supernode(
        ["--host", options.host, "--port", str(options.port), *flower],
        secret,
        pause=PollPause(options.longest_poll, active=options.active_seconds),
        heartbeat=lambda seconds: (
            HEARTBEAT_SECONDS if seconds <= POLL_SECONDS else options.idle_heartbeat
        ),
    )


if __name__ == "__main__":
    main()
