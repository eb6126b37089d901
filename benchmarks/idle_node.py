"""Count what an idle node sends and receives, in a proxy on its way to the server.

    python -m benchmarks.idle_node [--seconds 90]

One node, no run: once asking every three seconds, as while rounds follow one another, once every
ten. Printed are the bytes both ways after the node has connected, the requests, and the bytes of
one; `fedpet.estimate.idle_traffic` reckons with the larger of the two.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from pathlib import Path

from benchmarks.real_nodes import RealNodes, loopback_deployment
from benchmarks.socket_proxy import Wiretap
from fedpet.config import Experiment
from fedpet.deploy import write_deployment

SETTLE_SECONDS = 15.0


def count(seconds: float, *arguments: str) -> tuple[int, int, int]:
    """Return the bytes up and down and the requests of a node within so many seconds."""
    with tempfile.TemporaryDirectory(prefix="fedpet-idle-") as name:
        folder = Path(name) / "deployment"
        deployment = loopback_deployment(Experiment(), ["attic"])
        port = deployment.port
        write_deployment(deployment, folder)
        with RealNodes(folder, port) as real, Wiretap(folder / "server", port) as tap:
            real.start_server()
            real.register()
            script = folder / "nodes" / "attic" / "supernode.sh"
            text = script.read_text(encoding="utf-8")
            behind = re.sub(rf"127\.0\.0\.1:{port}\b", f"127.0.0.1:{tap.tap('attic')}", text)
            script.write_text(behind, encoding="utf-8")
            real.start_node("attic", *arguments)
            tapped = tap.nodes["attic"]
            while not tapped.up_bytes:
                time.sleep(0.2)
            time.sleep(SETTLE_SECONDS)
            before = tapped.up_bytes, tapped.down_bytes, len(tapped.exchanges())
            time.sleep(seconds)
            after = tapped.up_bytes, tapped.down_bytes, len(tapped.exchanges())
    up, down, requests = (now - then for now, then in zip(after, before, strict=True))
    return up, down, requests


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=90.0)
    arguments = parser.parse_args()
    for poll in (3.0, 10.0):
        up, down, requests = count(
            arguments.seconds, "--longest-poll", str(poll), "--active-seconds", "0"
        )
        print(
            f"asking every {poll:g} s: {up:,} bytes up, {down:,} down, {requests} requests in "
            f"{arguments.seconds:g} s: {(up + down) / requests:.0f} bytes each"
        )


if __name__ == "__main__":
    main()
