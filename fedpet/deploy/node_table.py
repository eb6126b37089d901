"""List the nodes of a deployment: who may come, when each came last, its bytes and refusals.

In:  the server's folder: the nodes' keys, `node-status.json` of the relay, the newest run's books.
Out: a line a node, as a table for a terminal or as JSON.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.table import Table

from fedpet.deploy.node_status import STATUS_FILE, NodeStatus, read_status
from fedpet.deploy.server_metrics import newest_run, read_rounds
from fedpet.errors import ConfigError
from fedpet.protocol.ledger import one_line
from fedpet.server.allowed_nodes import AllowedNodes
from fedpet.utils.formatting import format_bytes

__all__ = ["last_refusals", "list_nodes", "node_table"]


def list_nodes(folder: Path) -> list[dict[str, Any]]:
    """Return a line a node.

    Args:
        folder: Of a deployment, or of its server.

    Raises:
        ConfigError: There are no nodes' keys in it.
    """
    server = folder / "server" if (folder / "server").is_dir() else folder
    if not (server / "nodes").is_dir():
        raise ConfigError(
            f"{str(folder)!r} holds no nodes' keys: name a deployment's folder, or its server's."
        )
    status, run = read_status(server / STATUS_FILE), newest_run(server)
    refusals: dict[str, list[str]] = {}
    for line in read_rounds(run) if run else []:
        for one in line.get("refused", ()):
            refusals.setdefault(one["who"], []).append(f"round {line['round']}: {one['reason']}")
    lines = []
    for _, node in AllowedNodes(server / "nodes").items():
        seen = status.get(node.name, NodeStatus())
        own = [reason for name in (node.name, *node.names) for reason in refusals.get(name, ())]
        lines.append(
            {
                "name": node.name,
                "last_seen": seen.last_seen or None,
                "address": seen.address,
                "flower": seen.flower_version,
                "requests": seen.requests,
                "received_bytes": seen.received_bytes,
                "sent_bytes": seen.sent_bytes,
                "requests_refused": seen.refused,
                "refusals": len(own),
                "last_refusal": own[-1] if own else "",
                "run": run.name if run else "",
            }
        )
    return lines


def node_table(lines: list[dict[str, Any]]) -> Table:
    """Return the lines as a table."""
    table = Table(title=f"{len(lines)} nodes", title_justify="left")
    for name in (
        "node",
        "last seen",
        "address",
        "Flower",
        "received",
        "sent",
        "refused",
    ):
        table.add_column(name, no_wrap=True)
    for line in lines:
        table.add_row(
            line["name"],
            _ago(line["last_seen"]),
            line["address"],
            line["flower"],
            format_bytes(line["received_bytes"]),
            format_bytes(line["sent_bytes"]),
            str(line["refusals"] + line["requests_refused"]),
        )
    return table


def last_refusals(lines: list[dict[str, Any]]) -> list[str]:
    """Return a sentence for each node that the newest run refused: too long for a column."""
    return [
        f"{line['name']} was refused last in {one_line(line['last_refusal'])}"
        for line in lines
        if line["last_refusal"]
    ]


def _ago(at: float | None) -> str:
    if at is None:
        return "never"
    seconds = max(time.time() - at, 0)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
