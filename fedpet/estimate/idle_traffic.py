"""Compute what a real node sends and receives while nothing is asked of it.

A SuperNode asks its server for messages and gives signs of life, each one HTTP request over a TLS
connection that is kept. While rounds follow one another it does so as often as Flower's; after five
minutes without a message rarely (fedpet/client/supernode.py).

Sizes are measured (benchmarks/idle_node.py), TLS records and headers included, TCP's own left out.
"""

from __future__ import annotations

__all__ = ["idle_bytes"]

REQUEST_BYTES = 1041  # one question of either kind, its answer included
ACTIVE_POLL, IDLE_POLL = 3.0, 60.0  # seconds; as in fedpet/client/supernode.py, which a test checks
ACTIVE_HEARTBEAT, IDLE_HEARTBEAT = 30.0, 300.0
_DAY = 86400.0


def idle_bytes() -> dict[str, float]:
    """Return bytes a node and day, both ways together: of one idle for long, and of one polled."""

    def a_day(poll: float, heartbeat: float) -> float:
        # Flower waits 0.8 of a heartbeat less its limit of 5 s, on average.
        return _DAY * (1 / poll + 1 / (0.8 * (heartbeat - 5))) * REQUEST_BYTES

    return {
        "idle_bytes_per_node_day": a_day(IDLE_POLL, IDLE_HEARTBEAT),
        "idle_bytes_per_node_day_polled": a_day(ACTIVE_POLL, ACTIVE_HEARTBEAT),
    }
