"""What a round costs apart from training: 1,000 clients, no local step, the default plan.

    python -m benchmarks.round_overhead [--clients 1000] [--rounds 6] [--out FILE]

Everything else is as in the default job: each client's values are written into the resident
model, read out, encoded, framed, sent through Ray, checked, decoded and averaged, and each
client's bytes are counted alone: once without loss, once by the codec of the default job. The first
round, in which the workers load the model, is told apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedpet.config import Experiment
from fedpet.protocol.ledger import Ledger, RoundRecord
from fedpet.run.callbacks import Callback
from fedpet.run.ray_engine import simulate
from fedpet.run.run_folder import machine, versions

EXPERIMENTS = Path(__file__).parents[1] / "simulations" / "experiments"
CODECS = {
    "lossless": ("codec.uplink=float32", "codec.downlink=float32", "codec.downlink-mode=delta"),
    "default": (),
}


class Seconds(Callback):
    """Keeps each round's seconds."""

    def __init__(self) -> None:
        self.rounds: list[float] = []

    def on_stage(self, text: str) -> None:
        """Stages are not timed."""

    def on_round_end(self, record: RoundRecord, ledger: Ledger) -> None:
        """Note a round's wall time."""
        if record.round:
            self.rounds.append(record.round_seconds)


def measure(clients: int, rounds: int, codec: Sequence[str]) -> dict[str, Any]:
    """Run the rounds and give their seconds."""
    with tempfile.TemporaryDirectory() as folder:
        experiment = Experiment.from_file(
            EXPERIMENTS / "film-reviews.toml",
            [
                "population.partition=iid",
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
        result, _ = simulate(experiment, seconds)
    return {
        "codec": asdict(experiment.codec),
        "communicated_values": result["model"]["communicated_values"],
        "first_round_seconds": seconds.rounds[0],
        "later_rounds_seconds": seconds.rounds[1:],
        "median_later_round_seconds": statistics.median(seconds.rounds[1:]),
        "uplink_bytes": result["communication"]["uplink_bytes"],
    }


def main() -> None:
    """Measure, print, and keep where asked."""
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
