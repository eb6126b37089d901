"""Measure a round's cost apart from training: 1,000 clients, no local step, the default plan.

    python -m benchmarks.round_overhead [--clients 1000] [--rounds 6] [--out FILE]

Everything else is as in the default job: each client's values are written into the resident
model, read out, encoded, framed, sent through Ray, checked, decoded and averaged, and each client's
bytes are counted alone: once without loss, once by the codec of the default job. In the place of
training, every value moves by seeded noise of deviation 0.001, so that frames are as long as real
ones. The first round, in which the workers load the model, is reported apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedpet.client.node_config import NodeConfig
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


class Seconds(Callback):
    """Note each round's wall time."""

    def __init__(self) -> None:
        self.rounds: list[float] = []

    def on_round_end(self, record: RoundRecord, ledger: Ledger) -> None:
        """Note one."""
        if record.round:
            self.rounds.append(record.round_seconds)


@contextmanager
def noise_for_training() -> Iterator[None]:
    """Move trained tensors by noise wherever this process would run a client's epochs."""
    from fedpet.training import loop

    plain = loop.train_rows

    def noisy(model: Any, groups: Any, *given: Any, seed: int, **options: Any) -> Any:
        generator = torch.Generator().manual_seed(seed % 2**63)
        with torch.no_grad():
            for group in groups.values():
                for tensor in group if isinstance(group, list) else [group]:
                    tensor += NOISE * torch.randn(tensor.shape, generator=generator)
            if options.get("after_step"):
                options["after_step"]()
        return plain(model, groups, *given, seed=seed, **options)  # of no epoch

    users = [module for module in sys.modules.values() if vars(module).get("train_rows") is plain]
    for module in users:
        module.train_rows = noisy  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in users:
            module.train_rows = plain  # type: ignore[attr-defined]


def _client_app(experiment: Experiment) -> ClientApp:
    app, settings = ClientApp(), NodeConfig.from_experiment(experiment)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        from benchmarks.round_overhead import noise_for_training
        from fedpet.client.node import reply

        with noise_for_training():
            return reply(message, settings)

    return app


def measure(clients: int, rounds: int, codec: Sequence[str]) -> dict[str, Any]:
    """Run the rounds, and return their seconds and bytes."""
    with tempfile.TemporaryDirectory() as folder:
        experiment = Experiment.from_file(
            EXPERIMENTS / "film-reviews.toml",
            [
                "clients.partition=iid",
                f"clients.num-clients={clients}",
                "clients.min-rows=1",
                f"strategy.clients-per-round={clients}",
                f"strategy.num-rounds={rounds}",
                f"strategy.evaluate-every={rounds}",
                "training.local-epochs=0",
                "data.max-eval-rows=64",
                f"run.out='{folder}/run'",
                *codec,
            ],
        )
        seconds = Seconds()
        prepared, out = prepare(experiment, seconds), new_run_folder(experiment)
        result = run_on_ray(
            experiment,
            _client_app(experiment),
            lambda grid: federate(grid, prepared, out, seconds),
        )
    return {
        "codec": asdict(experiment.codec),
        "communicated_values": result["model"]["communicated_values"],
        "first_round_seconds": seconds.rounds[0],
        "later_rounds_seconds": seconds.rounds[1:],
        "median_later_round_seconds": statistics.median(seconds.rounds[1:]),
        "uplink_bytes": result["communication"]["uplink_bytes"],
        "uplink_bytes_per_client_round": result["communication"]["uplink_bytes_per_client_round"],
    }


def main() -> None:
    """Measure, print, and write the file of --out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", type=Path, help="write the measurement to this JSON file")
    arguments = parser.parse_args()
    found: dict[str, Any] = {"clients": arguments.clients}
    for name, codec in CODECS.items():
        found[name] = measure(arguments.clients, arguments.rounds, codec)
    found |= {"versions": versions(), "machine": machine()}
    print(json.dumps(found, indent=2))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
