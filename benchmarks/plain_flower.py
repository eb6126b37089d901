"""Compare plain Flower with LoRA of peft, FlowerTune's way, with fedpet on the same rounds.

    python -m benchmarks.plain_flower [--clients 10 100] [--rounds 4 2] [--out FILE [--again]]

Both fine-tune the same model on the same clients, drawn alike, for one epoch each, in batches of
the same number of rows and by the same learning rate, on two workers of one thread:

    fedpet        the job of `make run`
    template      benchmarks/lora_app.py: each message loads checkpoint, tokeniser and adapter
    tuned         the same, with all three kept in the worker's process

LoRA has rank 8, on query and value, or on every linear layer (`-all`). Runs follow each other, each
in a process of its own. The first round, in which workers start, is left out; plain Flower's has
two clients, to take less time. Processor and wall time are those of a round, from the end of the
one before, of this process with the server and Flower, of the workers, and of Ray's own. Memory is
the peak of all of them together, each page shared by n processes counted for a part of n (Linux's
PSS). Other programs on the machine lengthen the wall time: "others" is the processor time that they
took in the round.

With --out each row is written as it is measured. Called again, the command measures the rows that
the file lacks; with --again those of --methods and --clients anew.

Bytes are those of a client's messages in the last round as Flower serialises them: for plain Flower
of one pair, for fedpet the mean of its ledger, where each client counts alone, with the plan that a
client gets once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # it has no stubs
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from benchmarks.lora_app import Clients, Job, serve
from benchmarks.noisy_rounds import EXPERIMENTS, PARTS, processor_seconds
from benchmarks.round_overhead import measure_apart
from fedpet.backbone.pretrained import locate
from fedpet.client.node_config import cache_folder
from fedpet.config import Experiment
from fedpet.data import load_data
from fedpet.data.open_source import open_source
from fedpet.protocol.flower_compat.flower_simulation import quiet_flower
from fedpet.protocol.ledger import Ledger, RoundRecord
from fedpet.protocol.request import wire_bytes
from fedpet.run.callbacks import Callback
from fedpet.run.ray_engine import ray_runtime, simulate
from fedpet.run.run_folder import machine, versions
from fedpet.server.client_pool import ClientPool
from fedpet.utils.atomic_write import atomic_write

FEDPET = "fedpet"
METHODS = (FEDPET, "template", "tuned", "template-all", "tuned-all")
WORKERS = 2
EVALUATED = 16  # rows, in fedpet's last round: it cannot be told to evaluate nothing


class Marks(Callback):
    """Note wall and processor time at each round's end."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, dict[str, float]]] = []

    def on_stage(self, text: str) -> None:
        """Do nothing: stages are not timed."""

    def on_round_end(self, record: RoundRecord, ledger: Ledger) -> None:
        """Note one of fedpet's."""
        self.note(record.round)

    def note(self, server_round: int) -> None:
        """Note a round; 0 is the start."""
        if server_round:
            spent, machine_wide = processor_seconds(), psutil.cpu_times()
            busy = machine_wide.user + machine_wide.nice + machine_wide.system
            spent["others"] = busy - sum(spent.values())
            self.marks.append((time.perf_counter(), spent))

    def rounds(self) -> list[dict[str, float]]:
        """Return what each round took, but for the first: seconds of the wall, and by process."""
        return [
            {"wall": wall - before[0], **{part: spent[part] - before[1][part] for part in spent}}
            for before, (wall, spent) in zip(self.marks[:-1], self.marks[1:], strict=True)
        ]


def measure(method: str, clients: int, rounds: int, settings: Sequence[str]) -> dict[str, Any]:
    """Run a method, and return what its rounds took and what its messages weigh."""
    with tempfile.TemporaryDirectory() as folder:
        experiment = Experiment.from_file(
            EXPERIMENTS / "film-reviews.toml",
            [
                f"strategy.clients-per-round={clients}",
                f"strategy.num-rounds={rounds}",
                f"strategy.evaluate-every={rounds}",
                f"data.max-eval-rows={EVALUATED}",
                f"run.workers={WORKERS}",
                f"run.out='{folder}/run'",
                *settings,
            ],
        )
        marks = Marks()
        run = _run_fedpet if method == FEDPET else _run_plain
        found = run(method, experiment, Path(folder), marks)
    rows = marks.rounds()
    return {
        "method": method,
        "clients": clients,
        **found,
        "rounds": rows,
        "wall_seconds": statistics.median(row["wall"] for row in rows),
        "processor_seconds": {p: statistics.median(row[p] for row in rows) for p in PARTS},
    }


def _run_fedpet(method: str, experiment: Experiment, folder: Path, marks: Marks) -> dict[str, Any]:
    result, out = simulate(experiment, marks)
    last = json.loads((out.path / "rounds.jsonl").read_text().splitlines()[-1])
    return {
        "values": result["model"]["communicated_values"],
        "down_bytes": (last["downlink_bytes"] + last["plan_bytes"]) / last["clients"],
        "up_bytes": last["uplink_bytes"] / last["replies"],
    }


def _run_plain(method: str, experiment: Experiment, folder: Path, marks: Marks) -> dict[str, Any]:
    from flwr.simulation import run_simulation

    settings = experiment.strategy
    rows = clients_of(experiment)
    job = job_of(method, experiment, rows, folder)
    pool = ClientPool({client: len(own) for client, own in rows.items()}, homes={})
    client_app, server_app, results = ClientApp(), ServerApp(), []

    def draw(server_round: int) -> list[str]:
        drawn = pool.sample(server_round, settings.clients_per_round, experiment.run.seed)
        return drawn[:WORKERS] if server_round == 1 else drawn

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        from benchmarks.lora_app import train as answer  # not pickled with the app

        return answer(message, job)

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        results.append(serve(grid, job, draw, marks.note))

    with ray_runtime(num_cpus=WORKERS), quiet_flower():
        run_simulation(
            server_app,
            client_app,
            num_supernodes=len(rows),
            backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
        )
    [(replies, message, reply)] = results
    assert replies == min(settings.clients_per_round, len(rows))
    (arrays,) = reply.content.array_records.values()
    return {
        "values": sum(array.numpy().size for array in arrays.values()),
        "down_bytes": wire_bytes(message),
        "up_bytes": wire_bytes(reply),
    }


def job_of(method: str, experiment: Experiment, rows: Clients, folder: Path) -> Job:
    """Describe a method's job, and write the clients' rows into a folder."""
    file, training = folder / "clients.json", experiment.training
    file.write_text(json.dumps(rows), encoding="utf-8")
    return Job(
        model=str(locate(experiment.backbone)),
        rows=str(file),
        num_labels=len({label for client in rows.values() for _, label in client}),
        linears="all-linear" if method.endswith("-all") else "",
        cached=method.startswith("tuned"),
        batch_size=training.batch_size,
        max_length=experiment.data.max_length,
        learning_rate=training.rate_of("lora"),
        num_rounds=experiment.strategy.num_rounds,
    )


def clients_of(experiment: Experiment) -> Clients:
    """Return the texts and classes of fedpet's clients."""
    settings = experiment.data
    data = load_data(
        settings,
        experiment.clients,
        locate(experiment.backbone),
        cache=cache_folder(experiment),
        evaluation=False,
    )
    table = open_source(settings.source).read(settings.train_split)
    (column,) = settings.text_columns
    texts = table.column(column, "data.text-columns", settings.source)
    assert len(texts) == len(data.train), "rows are those of a whole split"
    return {
        client.id: [(texts[row], int(data.train.labels[row])) for row in client.rows.tolist()]
        for client in data.clients
    }


def main() -> None:
    """Measure, print, and write the file of --out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--rounds", type=int, nargs="+", default=[4, 2], help="for each of them")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--set", nargs="*", default=[], help="KEY=VALUE of the experiment")
    parser.add_argument("--out", type=Path, help="JSON file; what it holds is not measured anew")
    parser.add_argument("--again", action="store_true", help="measure these methods anew")
    arguments = parser.parse_args()
    here: dict[str, Any] = {"versions": versions(), "machine": machine()}
    found: dict[str, Any] = {"rows": [], **here}
    if arguments.out and arguments.out.exists():
        found = json.loads(arguments.out.read_text(encoding="utf-8"))
        if changed := [key for key, value in here.items() if found[key] != value]:
            parser.error(f"{arguments.out} is of other {changed}: give a new file, or remove it.")
    for clients, rounds in zip(arguments.clients, arguments.rounds, strict=True):
        for method in arguments.methods:
            cell = {"method": method, "clients": clients, "settings": arguments.set}
            known = [row for row in found["rows"] if cell.items() <= row.items()]
            if known and not arguments.again:
                continue
            row = cell | measure_apart(measure, method, clients, rounds, arguments.set)
            print(_line(row), file=sys.stderr, flush=True)
            rows = [*(one for one in found["rows"] if one not in known), row]
            found["rows"] = sorted(rows, key=_place)
            if arguments.out:  # after each, since all take minutes
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(arguments.out, f"{json.dumps(found, indent=2)}\n".encode())
    if not arguments.out:
        print(json.dumps(found, indent=2))


def _place(row: dict[str, Any]) -> tuple[int, int]:
    return row["clients"], METHODS.index(row["method"])


def _line(row: dict[str, Any]) -> str:
    spent = ", ".join(f"{part} {seconds:.2f}" for part, seconds in row["processor_seconds"].items())
    return (
        f"{row['method']}, {row['clients']} clients a round: {row['wall_seconds']:.1f} s, of "
        f"processor time: {spent}; a client {row['down_bytes']:,.0f} bytes down, "
        f"{row['up_bytes']:,.0f} up; peak {row['peak_mb']:.0f} MB"
    )


if __name__ == "__main__":
    main()
