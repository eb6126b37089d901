"""Compare one federation on Ray with the same on real nodes over TLS, then disturb the nodes.

    python -m benchmarks.deploy_demo [--rounds 3] [--eventful-rounds 44] [--eval-rows 256]

A SuperLink behind its relay and three warm SuperNodes on the loopback, with certificates and node
keys as `fedpet deploy` makes them. Each reason to exit with 1 is a line that says "NO":

1. Undisturbed: each node has a file with the reviews of a third of the films. Plain HTTP is
   refused, an unregistered node is turned away, all films are found by the roll call, and the final
   values are those of the simulation, bit for bit.
2. Eventful: the same processes run again on fewer rows, while one node is killed, one grows its
   file, one has a full disk, and one gets a new key (benchmarks/eventful_run.py). Such a run cannot
   end with the values of an undisturbed one: it is held against a replay, in this process, of the
   same participants and rows by round, bit for bit.

Every process is ended and every file removed.
"""

from __future__ import annotations

import argparse
import html
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.eventful_run import (
    DISK_MIB,
    FULL,
    Disturbance,
    missing,
    overrides,
    replayed,
    shrink,
    took_part_last,
    with_settings,
)
from benchmarks.real_nodes import (
    RealNodes,
    can_mount,
    free_ports,
    loopback_deployment,
    plain_http_is_refused,
)
from fedpet.config import Experiment
from fedpet.data.open_source import open_source
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

    def table(self, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show a table."""
        texts = [[str(cell) for cell in row] for row in (heads, *rows)]
        widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
        for text in texts:
            line = "  ".join(cell.ljust(width) for cell, width in zip(text, widths, strict=True))
            print(f"          {line}".rstrip(), flush=True)

    def on_round_end(self, record: RoundRecord, ledger: Ledger) -> None:
        """Show nothing of the simulation's rounds."""


def demonstrate(rounds: int, eventful_rounds: int, eval_rows: int, folder: Path) -> bool:
    """Run all, compare. True if everything was as it should be."""
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
        full_disk = can_mount()
        for name in NODES:
            real.start_node(name, disk_mib=DISK_MIB if name == FULL and full_disk else 0)
        make_intruder(folder / "deployment")
        report.check("a node that is not registered is turned away", *_turned_away(real))
        report.on_stage(f"running {rounds} rounds on {len(NODES)} nodes")
        done = real.run(limit_seconds=RUN_SECONDS)
        log = (done.stdout + done.stderr)[-4000:]
        report.check("the run ends with exit code 0", done.returncode == 0, log)
        if done.returncode == 0:
            _compare(report, simulated, real.result(f"{experiment.run.name}-1"))
            served = deployment.server_experiment()
            disturb(report, served, real, eventful_rounds, folder, full_disk=full_disk)
    return not report.failed


def disturb(
    report: Report,
    experiment: Experiment,
    real: RealNodes,
    rounds: int,
    folder: Path,
    *,
    full_disk: bool,
) -> None:
    """Run the eventful part."""
    clients = 0
    for name in NODES:
        path = real.folder / "nodes" / name / "data.jsonl"
        clients += shrink(path)
        shutil.copy(path, path.with_name("before.jsonl"))
    eventful = with_settings(experiment, rounds, clients)
    run = f"{experiment.run.name}-2"
    report.on_stage(f"running {rounds} rounds of {clients} films, with events")
    if not full_disk:
        report.on_stage("no disk can be mounted for a process here: none will be full")
    events = Disturbance(real, run, rounds, full_disk, lambda text: report.on_stage(f"     {text}"))
    done = real.run(*overrides(eventful), limit_seconds=RUN_SECONDS, meanwhile=events)
    log = (done.stdout + done.stderr)[-4000:]
    report.check("the run ends with exit code 0", done.returncode == 0, log)
    report.check("all was done while it ran", not events.trouble, events.trouble)
    result, lines = real.result(run), real.rounds(run)
    told = [[e["round"], e["node"], e["event"], e["details"]] for e in result["events"]]
    report.on_stage("its books tell of these events:")
    report.table(["round", "node", "event", ""], told)
    absent = missing(lines, full_disk=full_disk)
    report.check("every event is in result.json and rounds.jsonl", not absent, str(absent))
    grown = [r for r in result["refused"] if "rows" in r["reason"] or "example" in r["reason"]]
    report.check("nobody is refused for a file that grew", not grown, str(grown))
    last = took_part_last(lines)
    report.check("all nodes take part in the last round", last == set(NODES), str(sorted(last)))
    place = real.folder / "server" / "runs" / run
    real.call("fedpet", "report", place)
    page = html.unescape((place / "report.html").read_text(encoding="utf-8"))
    unnamed = [row for row in told if not all(str(cell) in page for cell in row)]
    report.check("report.html names every event", not unnamed, str(unnamed))
    report.on_stage(f"replaying {rounds} rounds in this process")
    expected = replayed(eventful, real, lines, folder / "replay")
    report.check(
        f"final values {result['final_values_sha256'][:16]}... are the replay's",
        result["final_values_sha256"] == expected,
        f"replayed: {expected}",
    )


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
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--eventful-rounds", type=int, default=44)
    parser.add_argument("--eval-rows", type=int, default=256)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fedpet-demo-"))
    try:
        holds = demonstrate(
            arguments.rounds, arguments.eventful_rounds, arguments.eval_rows, folder
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    main()
