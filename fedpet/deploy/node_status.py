"""Keep what the relay knows of each node in a file, for `fedpet nodes` and the metrics."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from fedpet.utils.atomic_write import atomic_write

__all__ = ["STATUS_FILE", "NodeStatus", "noted", "read_status", "write_status"]

STATUS_FILE = "node-status.json"
STATUS_SECONDS = 15.0


@dataclass
class NodeStatus:
    """Count what came of a node; a line of `node-status.json`.

    Bytes are of bodies: TLS and headers are not in them.
    """

    first_seen: float = 0.0  # seconds since 1970
    last_seen: float = 0.0
    address: str = ""
    flower_version: str = ""
    requests: int = 0
    refused: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0


def read_status(path: Path) -> dict[str, NodeStatus]:
    """Read `node-status.json`; what does not read is nothing."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        return {name: NodeStatus(**line) for name, line in table.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def write_status(path: Path, status: Mapping[str, NodeStatus]) -> None:
    """Write `node-status.json`."""
    lines = {name: asdict(one) for name, one in sorted(status.items())}
    atomic_write(path, json.dumps(lines, indent=1).encode())


@contextlib.asynccontextmanager
async def noted(path: Path, status: Mapping[str, NodeStatus]) -> AsyncIterator[None]:
    """Write the status every few seconds, and at the end."""

    async def note() -> None:
        while True:
            await asyncio.sleep(STATUS_SECONDS)
            with contextlib.suppress(OSError):  # the disk is full: nodes are served all the same
                write_status(path, status)

    task = asyncio.create_task(note())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(OSError):
            write_status(path, status)
