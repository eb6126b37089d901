"""Compare one federation on Ray with the same on real nodes over TLS, bit for bit.

    python -m benchmarks.deploy_demo [--rounds 5] [--eval-rows 256]

A SuperLink and three SuperNodes on the loopback, with certificates and node keys as `fedpet deploy`
makes them; each node has a file with the reviews of a third of the films. Shown, and each a reason
to exit with 1 if it is not so: plain HTTP is refused, an unregistered node is turned away, all
films are found by the roll call, and the final values are those of the simulation, bit for bit.
Every process is ended and every file removed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.real_nodes import RealNodes, free_ports, loopback_deployment, plain_http_is_refused
from fedpet.config import Experiment
from fedpet.data.sources import open_source
from fedpet.deploy import write_deployment
from fedpet.deploy.certificates import make_node_key
from fedpet.protocol.ledger import Ledger, RoundRecord
from fedpet.run.callbacks import Callback
from fedpet.run.ray_engine import simulate

NODES = ("attic", "barn", "cellar")
INTRUDER = "intruder"
EXPERIMENT = Path(__file__).parents[1] / "simulations" / "experiments" / "film-reviews.toml"
RUN_SECONDS = 1800.0
TURNED_AWAY_SECONDS = 120.0


class Report(Callback):
    """Prints what is found, and remembers whether all of it was as it should be."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self.failed = False

    def on_stage(self, text: str) -> None:
        """Show the stage that begins."""
        print(f"[{time.monotonic() - self._started:5.0f} s] {text}", flush=True)

    def check(self, text: str, holds: bool, otherwise: str = "") -> None:
        """Show one finding."""
        self.failed |= not holds
        self.on_stage(f"{'yes' if holds else 'NO '}  {text}")
        if not holds and otherwise:
            print(otherwise, flush=True)

    def on_round_end(self, record: RoundRecord, ledger: Ledger) -> None:
        """Show nothing of the simulation's rounds."""


def demonstrate(rounds: int, eval_rows: int, folder: Path) -> bool:
    """Run both, compare. True if everything was as it should be."""
    report = Report()
    experiment = Experiment.from_file(
        EXPERIMENT,
        [
            f"strategy.num-rounds={rounds}",
            f"strategy.evaluate-every={rounds}",
            f"data.max-eval-rows={eval_rows}",
            f"run.out='{folder}/simulated'",
            f"run.cache='{folder}/cache'",
        ],
    )
    report.on_stage(f"simulating {rounds} rounds on Ray")
    simulated, _ = simulate(experiment, report)
    clients = simulated["data"]["clients"]

    several = {"client_column": "film", "clients_per_node": clients, "clients": clients}
    deployment = loopback_deployment(experiment, NODES, **several)
    write_deployment(deployment, folder / "deployment")
    rows = write_thirds(folder / "deployment" / "nodes", experiment)
    parts = (f"{name} with {n} reviews" for name, n in rows.items())
    report.on_stage(f"deployed: {', '.join(parts)}")
    with RealNodes(folder / "deployment", deployment.port) as real:
        real.start_server()
        report.check("plain HTTP is refused", plain_http_is_refused(deployment.port))
        real.register()
        for name in NODES:
            real.start_node(name)
        make_intruder(folder / "deployment")
        report.check("a node that is not registered is turned away", *_turned_away(real))
        report.on_stage(f"running {rounds} rounds on {len(NODES)} nodes")
        done = real.run(limit_seconds=RUN_SECONDS)
        log = (done.stdout + done.stderr)[-4000:]
        report.check("the run ends with exit code 0", done.returncode == 0, log)
        if done.returncode == 0:
            _compare(report, simulated, real.result(f"{experiment.run.name}-1"))
    return not report.failed


def _compare(report: Report, simulated: Mapping[str, Any], deployed: Mapping[str, Any]) -> None:
    found, known = (
        (result["data"]["clients"], result["data"]["train_rows"])
        for result in (deployed, simulated)
    )
    report.check(
        f"the roll call finds all {known[0]} films with {known[1]} reviews",
        found == known,
        f"{found} instead of {known}",
    )
    report.check("nobody was refused", not deployed["refused"], str(deployed["refused"]))
    report.check(
        f"final values {deployed['final_values_sha256'][:16]}... are the simulation's",
        deployed["final_values_sha256"] == simulated["final_values_sha256"],
        f"simulated: {simulated['final_values_sha256']}",
    )
    quality, seconds = deployed["quality"], deployed["time"]["rounds_seconds"]
    report.on_stage(f"{quality['metric']} {quality['final']:.4f}; {seconds:.1f} s of rounds")


def write_thirds(folder: Path, experiment: Experiment) -> dict[str, int]:
    """Each node's file: the training reviews of every third film, in their order.

    Returns:
        Node -> rows.
    """
    data = experiment.data
    table = open_source(data.source).read(data.train_split)
    names = ("text", "label", experiment.clients.client_column)
    columns = [table.column(name, "", "the bundled data set") for name in names]
    films = sorted(set(columns[2]))
    home = {film: NODES[index % len(NODES)] for index, film in enumerate(films)}
    lines: dict[str, list[str]] = {name: [] for name in NODES}
    for text, label, film in zip(*columns, strict=True):
        lines[home[film]].append(json.dumps({"text": text, "label": label, "film": film}))
    for name, own in lines.items():
        (folder / name / "data.jsonl").write_text("\n".join(own) + "\n", encoding="utf-8")
    return {name: len(own) for name, own in lines.items()}


def make_intruder(folder: Path) -> None:
    """Start a node like the first, but with a key that nobody registered."""
    place = folder / "nodes" / INTRUDER
    shutil.copytree(folder / "nodes" / NODES[0], place)
    (place / "node.key").write_bytes(make_node_key()[0])


def _turned_away(real: RealNodes) -> tuple[bool, str]:
    process = real.start_node(INTRUDER, "--port", str(free_ports(1)[0]))
    limit = time.monotonic() + TURNED_AWAY_SECONDS
    while process.poll() is None and time.monotonic() < limit:
        time.sleep(0.2)
    return process.poll() not in (None, 0), real.log(INTRUDER)[-2000:]


def main() -> None:
    """Demonstrate; exits with 1 if anything was not as it should be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--eval-rows", type=int, default=256)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fedpet-demo-"))
    try:
        holds = demonstrate(arguments.rounds, arguments.eval_rows, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    main()
