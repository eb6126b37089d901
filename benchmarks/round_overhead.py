"""Measure a round's cost apart from training, by clients of a round: time, and memory.

    python -m benchmarks.round_overhead [--clients 100 1000 10000] [--rounds 5] [--out FILE]

Everything but the training is as in the default job: each client's values are written into the
resident model, read out, encoded, framed, sent through Ray, checked, decoded and averaged, and each
client's bytes are counted alone: once without loss, once by the codec of the default job. In the
place of training, every value moves by seeded noise of deviation 0.001, so that frames are as long
as real ones; each client has one made-up row.

For each codec and number of clients there is a run in a process of its own. Processor time is that
between the ends of the first round, in which the workers load the model, and of the last but one:
of the workers, of this process with the server and Flower, and of Ray's own. The peak of memory is
that of all of them together, each page shared by n processes counted for a part of n (Linux's PSS).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]  # it has no stubs
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedpet.client.node_config import NodeConfig
from fedpet.codec.acceleration import use_kernels
from fedpet.config import Experiment
from fedpet.protocol.ledger import Ledger, RoundRecord
from fedpet.run.callbacks import Callback
from fedpet.run.federate import federate, prepare
from fedpet.run.ray_engine import run_on_ray
from fedpet.run.run_folder import machine, new_run_folder, versions

EXPERIMENTS = Path(__file__).parents[1] / "simulations" / "experiments"
CODECS = {
    "lossless": ("codec.uplink=float32", "codec.downlink=float32", "codec.downlink-mode=delta"),
    "default": (),
}
NOISE = 1e-3  # deviation of an update's entries
PLACES = 1 << 20  # in the noise, at which a client's may begin
PARTS = ("worker", "server", "ray")
SAMPLE_SECONDS = 0.2  # between two looks at the memory


class Costs(Callback):
    """Note each round's wall time, and the processor time up to its end."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.processor: list[dict[str, float]] = []

    def on_stage(self, text: str) -> None:
        """Do nothing: stages are not timed."""

    def on_round_end(self, record: RoundRecord, ledger: Ledger) -> None:
        """Note one."""
        if record.round:
            self.seconds.append(record.round_seconds)
            self.processor.append(processor_seconds())


def processor_seconds() -> dict[str, float]:
    """Return what this process and those below it have taken so far."""
    spent = dict.fromkeys(PARTS, 0.0)
    here = psutil.Process()
    for process in (here, *here.children(recursive=True)):
        with suppress(psutil.Error):
            times = process.cpu_times()
            is_worker = "ClientAppActor" in " ".join(process.cmdline())
            part = "server" if process == here else "worker" if is_worker else "ray"
            spent[part] += times.user + times.system
    return spent


@contextmanager
def noise_for_training() -> Iterator[None]:
    """Move trained tensors by noise wherever this process would run a client's epochs.

    The noise is drawn once, and each client takes it from another place, by its seed: drawing it
    would take longer than much of what is measured.
    """
    from fedpet.training import loop

    plain, drawn = loop.train_rows, torch.empty(0)

    def noisy(model: Any, groups: Any, *given: Any, seed: int, **options: Any) -> Any:
        nonlocal drawn
        tensors = [
            t for group in groups.values() for t in ([group], group)[isinstance(group, list)]
        ]
        count = sum(tensor.numel() for tensor in tensors)
        if len(drawn) != count + PLACES:
            drawn = NOISE * torch.randn(count + PLACES, generator=torch.Generator().manual_seed(0))
        start = seed % PLACES
        with torch.no_grad():
            for tensor in tensors:
                tensor += drawn[start : start + tensor.numel()].view_as(tensor)
                start += tensor.numel()
        return plain(model, groups, *given, seed=seed, **options)  # of no epoch

    users = [module for module in sys.modules.values() if vars(module).get("train_rows") is plain]
    for module in users:
        module.train_rows = noisy  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in users:
            module.train_rows = plain  # type: ignore[attr-defined]


_noisy: list[AbstractContextManager[None]] = []


def answer_with_noise(message: Message, settings: NodeConfig) -> Message:
    """Answer as a node does, with noise for training as long as the process lives."""
    from fedpet.client.node import reply

    if not _noisy:
        _noisy.append(noise_for_training())
        _noisy[0].__enter__()
    return reply(message, settings)


def _client_app(experiment: Experiment) -> ClientApp:
    app, settings = ClientApp(), NodeConfig.from_experiment(experiment)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        from benchmarks.round_overhead import answer_with_noise  # not pickled with the app

        return answer_with_noise(message, settings)

    return app


def measure(clients: int, rounds: int, codec: Sequence[str]) -> dict[str, Any]:
    """Run the rounds, and return their seconds and bytes."""
    with tempfile.TemporaryDirectory() as folder:
        for split, count in (("train", clients), ("test", 64)):
            _write_rows(Path(folder) / "rows" / f"{split}.jsonl", count)
        experiment = Experiment.from_file(
            EXPERIMENTS / "film-reviews.toml",
            [
                f"data.source='{folder}/rows'",
                "clients.partition=iid",
                f"clients.num-clients={clients}",
                "clients.min-rows=1",
                f"strategy.clients-per-round={clients}",
                f"strategy.num-rounds={rounds}",
                f"strategy.evaluate-every={rounds}",
                "training.local-epochs=0",
                f"run.out='{folder}/run'",
                *codec,
            ],
        )
        costs = Costs()
        prepared, out = prepare(experiment, costs), new_run_folder(experiment)
        result = run_on_ray(
            experiment,
            lambda: _client_app(experiment),
            lambda grid: federate(grid, prepared, out, costs),
        )
        last = json.loads((out.path / "rounds.jsonl").read_text().splitlines()[-1])
    # Evaluation comes after a round's end: that of the first and of the last are left out.
    first, until, between = costs.processor[0], costs.processor[-2], (rounds - 2) * clients
    return {
        "clients": clients,
        "codec": asdict(experiment.codec),
        "communicated_values": result["model"]["communicated_values"],
        "first_round_seconds": costs.seconds[0],
        "later_rounds_seconds": costs.seconds[1:],
        "median_later_round_seconds": statistics.median(costs.seconds[1:]),
        "processor_ms_per_client": {p: 1e3 * (until[p] - first[p]) / between for p in PARTS},
        "uplink_bytes_per_client_round": result["communication"]["uplink_bytes_per_client_round"],
        "messages_per_round": last["messages"],
        "final_values_sha256": result["final_values_sha256"],
    }


def _write_rows(path: Path, count: int) -> None:
    random = np.random.default_rng(count)
    words = ["good", "bad", "film", "plot", "actor", "scene", "dull", "bright"]
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            row = {"text": " ".join(random.choice(words, 12)), "label": ("bad", "good")[number % 2]}
            file.write(json.dumps(row) + "\n")


def measure_apart(work: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """Call in a process of its own, and add the peak of its and its children's memory."""
    peak, over = 0, threading.Event()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        [worker] = multiprocessing.active_children()
        found = pool.apply_async(work, given)
        while not found.ready():
            peak = max(peak, memory_bytes(psutil.Process(worker.pid)))
            over.wait(SAMPLE_SECONDS)
        return {**found.get(), "peak_mb": peak / 1e6}


def memory_bytes(process: psutil.Process) -> int:
    """Return the memory that a process and those below it take now."""
    taken = 0
    with suppress(psutil.Error):
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):
                taken += one.memory_full_info().pss
    return taken


def main() -> None:
    """Measure, print, and write the file of --out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--rounds", type=int, default=5, help="at least 3")
    parser.add_argument("--codecs", nargs="+", default=list(CODECS), choices=list(CODECS))
    parser.add_argument("--out", type=Path, help="write the measurement to this JSON file")
    arguments = parser.parse_args()
    with suppress(ImportError):
        use_kernels("compiled")  # compiled once a machine, here before anything is timed
    rows: list[dict[str, Any]] = []
    for name in arguments.codecs:
        for clients in arguments.clients:
            row = {"name": name} | measure_apart(measure, clients, arguments.rounds, CODECS[name])
            print(_line(row), file=sys.stderr, flush=True)
            rows.append(row)
    found = {"rows": rows, "versions": versions(), "machine": machine()}
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    else:
        print(json.dumps(found, indent=2))


def _line(row: dict[str, Any]) -> str:
    spent = ", ".join(f"{p} {ms:.2f}" for p, ms in row["processor_ms_per_client"].items())
    return (
        f"{row['name']}, {row['clients']} clients: {row['median_later_round_seconds']:.2f} s a "
        f"round, ms of processor time a client: {spent}; {row['messages_per_round']} messages, "
        f"peak {row['peak_mb']:.0f} MB"
    )


if __name__ == "__main__":
    main()
