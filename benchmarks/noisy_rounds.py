"""Run rounds without training, and write what they cost: one run of `benchmarks.round_overhead`.

Imports of fedpet alone what a checkout of some time ago has too, and nothing of the benchmarks:
`round_overhead` copies the file into a folder of its own and runs it by either checkout. Noise,
rows, settings and measurement are then the same for both, and the experiment is each one's own.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil  # type: ignore[import-untyped]  # it has no stubs
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

import fedpet
from fedpet.client.node_config import NodeConfig
from fedpet.config import Experiment
from fedpet.protocol.ledger import Ledger, RoundRecord
from fedpet.run.callbacks import Callback
from fedpet.run.federate import federate, prepare
from fedpet.run.ray_engine import run_on_ray
from fedpet.run.run_folder import new_run_folder

CHECKOUT = Path(fedpet.__file__).parents[1]
EXPERIMENTS = CHECKOUT / "simulations" / "experiments"
CODECS = {
    "lossless": ("codec.uplink=float32", "codec.downlink=float32", "codec.downlink-mode=delta"),
    "default": (),
}
# As in the tables of codecs: 89,870 values, whatever `make run` trains.
JOB = ("structure.preset=lora-factors+lnfit", "mask.density=0.001")
NOISE = 1e-3  # deviation of an update's entries
PLACES = 1 << 20  # in the noise, at which a client's may begin
PARTS = ("worker", "server", "ray")


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
        answer = import_module("noisy_rounds").answer_with_noise  # not pickled with the app
        return cast("Message", answer(message, settings))

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
                *JOB,
                *codec,
            ],
        )
        costs, app = Costs(), _client_app(experiment)
        prepared, out = prepare(experiment, costs), new_run_folder(experiment)
        takes_app = "client_app" in inspect.signature(run_on_ray).parameters  # of old, no maker
        result = run_on_ray(
            experiment,
            app if takes_app else lambda: app,  # type: ignore[arg-type]
            lambda grid: federate(grid, prepared, out, costs),
        )
        last = json.loads((out.path / "rounds.jsonl").read_text().splitlines()[-1])
    # Evaluation comes after a round's end: that of the first and of the last are left out.
    marks, between = costs.processor[:-1], (rounds - 2) * clients
    steps = list(itertools.pairwise(marks))
    return {
        "clients": clients,
        "codec": asdict(experiment.codec),
        "communicated_values": result["model"]["communicated_values"],
        "first_round_seconds": costs.seconds[0],
        "later_rounds_seconds": costs.seconds[1:],
        "median_later_round_seconds": statistics.median(costs.seconds[1:]),
        "processor_ms_per_client": {p: 1e3 * (marks[-1][p] - marks[0][p]) / between for p in PARTS},
        "median_processor_ms_per_client": {
            p: 1e3 * statistics.median(after[p] - before[p] for before, after in steps) / clients
            for p in PARTS
        },
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


def main() -> None:
    """Run, and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("clients", type=int)
    parser.add_argument("rounds", type=int)
    parser.add_argument("codec", choices=list(CODECS))
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    with suppress(ImportError):  # fedpet of some time ago has no kernels to compile
        from fedpet.codec.acceleration import use_kernels

        use_kernels("compiled")  # once a machine, here before anything is timed
    found = measure(arguments.clients, arguments.rounds, CODECS[arguments.codec])
    found["checkout"] = str(CHECKOUT)
    arguments.file.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
