"""Give a server's metrics to Prometheus: its newest run, its nodes, its disk.

In:  the server's folder: `runs/*/rounds.jsonl`, and what the relay has counted of each node.
Out: a page in Prometheus' text format, by prometheus-client (`pip install 'fedpet[metrics]'`).

Rounds are of the run whose books were written last, and are labelled with it; "bytes" are those of
the ledger (fedpet/protocol/ledger.py), each client alone. A node's bytes are of the bodies of its
requests, as the relay saw them, polls included.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedpet.deploy.node_status import NodeStatus

__all__ = ["newest_run", "page_of", "read_rounds", "stored_bytes"]

_LAST = {  # of the last round
    "round": ("round", "Round that was over last."),
    "clients": ("round_clients", "Clients drawn in that round."),
    "replies": ("round_replies", "Usable replies in that round."),
    "round_seconds": ("round_seconds", "Length of that round."),
    "loss": ("train_loss", "Mean training loss in that round."),
    "metric": ("metric", "Metric that decides, after that round."),
}
_SUMS = {  # over the run
    "uplink_bytes": ("uplink_bytes", "Sent by clients."),
    "downlink_bytes": ("downlink_bytes", "Sent to clients."),
    "plan_bytes": ("plan_bytes", "Sent as plans and registrations."),
    "wire_bytes": ("wire_bytes", "Of this run's messages, both ways."),
}


def newest_run(server: Path) -> Path | None:
    """Return the run folder of a server whose books were written last."""
    books = list((server / "runs").glob("*/rounds.jsonl"))
    return max(books, key=lambda path: path.stat().st_mtime).parent if books else None


def read_rounds(run: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's books; one that is being written is left out."""
    lines = []
    for line in (run / "rounds.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def stored_bytes(server: Path) -> dict[str, int]:
    """Return the bytes on disk of a server's folder: database, runs, logs, cache."""
    parts = {
        "database": server.glob("superlink.db*"),
        "runs": (server / "runs").rglob("*"),
        "logs": server.glob("*.log*"),
        "cache": (server / "cache").rglob("*"),
    }
    return {
        name: sum(path.stat().st_size for path in paths if path.is_file())
        for name, paths in parts.items()
    }


def page_of(server: Path) -> Callable[[Mapping[str, NodeStatus]], bytes] | None:
    """Return what makes the page of a server's folder; None where the library is absent."""
    try:
        from prometheus_client import CollectorRegistry, generate_latest
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    except ImportError:
        return None

    class Server:
        """Collect a server's metrics when they are asked for."""

        def __init__(self, status: Mapping[str, NodeStatus]) -> None:
            self._status = status

        def collect(self) -> Iterator[Any]:
            """Yield all of them."""
            yield from _of_run(server, GaugeMetricFamily, CounterMetricFamily)
            last = GaugeMetricFamily(
                "fedpet_node_last_seen_seconds", "Time of the last request.", labels=["node"]
            )
            counts = {
                name: CounterMetricFamily(f"fedpet_node_{name}", text, labels=["node"])
                for name, text in (
                    ("requests", "Requests of a node."),
                    ("refused", "Requests that the relay refused."),
                    ("received_bytes", "Bodies that a node sent."),
                    ("sent_bytes", "Bodies that a node was sent."),
                )
            }
            for name, one in sorted(self._status.items()):
                last.add_metric([name], one.last_seen)
                for key, family in counts.items():
                    family.add_metric([name], getattr(one, key))
            yield from (last, *counts.values())
            disk = GaugeMetricFamily("fedpet_disk_bytes", "On the server.", labels=["what"])
            for name, size in stored_bytes(server).items():
                disk.add_metric([name], size)
            yield disk

    def page(status: Mapping[str, NodeStatus]) -> bytes:
        registry = CollectorRegistry()
        registry.register(Server(status))
        made: bytes = generate_latest(registry)
        return made

    return page


def _of_run(server: Path, gauge: Any, counter: Any) -> Iterator[Any]:
    run = newest_run(server)
    lines = read_rounds(run) if run else []
    if run is None or not lines:
        return
    label = [run.name]
    for key, (name, text) in _LAST.items():
        if (value := lines[-1].get(key)) is not None:
            family = gauge(f"fedpet_{name}", text, labels=["run"])
            family.add_metric(label, value)
            yield family
    for key, (name, text) in _SUMS.items():
        family = counter(f"fedpet_{name}", text, labels=["run"])
        family.add_metric(label, sum(line.get(key, 0) for line in lines))
        yield family
    refused = counter("fedpet_refusals", "Clients refused, by who.", labels=["run", "who"])
    count: dict[str, int] = {}
    for line in lines:
        for one in line.get("refused", ()):
            count[one["who"]] = count.get(one["who"], 0) + 1
    for who, number in sorted(count.items()):
        refused.add_metric([run.name, who], number)
    yield refused
