"""Measure aggregation rules under attack: a fifth of each round's clients lie.

    python -m benchmarks.attacks --out attacks.json

Each of four rules under each attack is a cell, RESULTS/attacks/RULE-ATTACK.json: the default job on
fewer, shorter rows. The table's figures go into one file.

A liar trains like everyone and then sends, instead of its update u: -10 u ("sign-flip"), Gaussian
noise of ten times the norm of u ("random"), or NaN. It says so in a proper frame of the right plan,
round and length, with a checksum that fits. Who lies is drawn anew each round, two of ten clients;
trimming and Krum know that number. A cell that is there is not run again.

Everything runs in this process, one client after another: a cell's time is that of one core.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cell import Result, complete, write_json
from benchmarks.experiment_grid import FEDPET, ExperimentCell
from benchmarks.rate import Rate
from fedpet.client.node import Node
from fedpet.client.node_config import NodeConfig
from fedpet.codec import decode_values, encode_values
from fedpet.codec.floats import encode_float32
from fedpet.config import Experiment
from fedpet.config.builtin import experiment_file
from fedpet.errors import ConfigError, FedpetError, InputError, RunError
from fedpet.pet.layout import quantisation_groups
from fedpet.protocol.codec_seeds import uplink_seeds
from fedpet.protocol.flower_compat.flower_simulation import quiet_flower
from fedpet.protocol.frame import (
    Frame,
    Measured,
    Refusal,
    pack_frame,
    pack_measured,
    pack_refusal,
    unpack_frames,
)
from fedpet.protocol.request import read_request
from fedpet.report.number_format import show_metric
from fedpet.run.callbacks import Callback
from fedpet.run.federate import Prepared, federate, prepare
from fedpet.run.local_grid import LocalGrid
from fedpet.run.run_folder import RunFolder
from fedpet.utils.seeds import derive_seed

LIARS = 0.2  # fraction of a round's clients, rounded down
FACTOR = 10.0
ROUNDS = 15
CLIENTS = 10
# A cell within minutes on one core: the films of `make run` with fewer and shorter rows.
SMALLER = (
    "mask.density=0.001",  # what was trained when their cells were run
    "structure.preset=lora-factors+lnfit",
    "structure.rank=8",
    "training.learning-rate=0.01",
    "training.learning-rates=['mask=0.002']",
    "training.batch-size=8",
    "training.logit-adjustment=1.0",
    "strategy.server-momentum=0.0",
    f"strategy.num-rounds={ROUNDS}",
    f"strategy.clients-per-round={CLIENTS}",
    f"strategy.evaluate-every={ROUNDS}",
    "data.max-train-rows=4000",
    "data.max-eval-rows=600",
    "data.max-length=32",
    "clients.min-rows=4",
    "run.workers=1",
    "codec.uplink=float32",  # the rules are compared, not codecs
    "codec.downlink=float32",
    "codec.downlink-mode=delta",
    "training.cls-only=false",  # their cells were run with whole passes
)
STRATEGY_PARAMETERS = {
    "fedavg": (),
    "fedmedian": (),
    "fedtrimmedavg": (f"strategy.trim-fraction={LIARS}",),
    "krum": (f"strategy.num-malicious={int(LIARS * CLIENTS)}",),
}
RESULTS = Path(__file__).parent / "results" / "attacks"

Lie = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def _sign_flip(update: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return -FACTOR * update


def _random(update: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    noise = generator.normal(size=len(update))
    return FACTOR * np.linalg.norm(update) / np.linalg.norm(noise) * noise


def _nan(update: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return np.full_like(update, np.nan)


ATTACKS: dict[str, Lie | None] = {
    "none": None,
    "sign-flip": _sign_flip,
    "random": _random,
    "nan": _nan,
}


class Liars:
    """Answer as a node with clients that lie.

    Args:
        answer: The honest node's.
        prepared: Of the run: how its frames are coded, and its seed.
        lie: Turns a liar's update into what it sends, float32, (num_values,).
    """

    def __init__(
        self, answer: Callable[[bytes], bytes], prepared: Prepared, lie: Lie | None
    ) -> None:
        self._answer = answer
        self._groups = quantisation_groups(prepared.pet.segments)
        self._seed = prepared.plan.seed
        self._lie = lie

    def answer(self, payload: bytes) -> bytes:
        """Return the node's reply."""
        whole = self._answer(payload)
        if self._lie is None:
            return whole
        clients = sorted(read_request(payload).clients)
        parts = list(unpack_frames(whole, max_frames=len(clients), max_payload_bytes=len(whole)))
        liars = self._liars(clients, parts[0].server_round)
        return b"".join(
            pack_refusal(part)
            if isinstance(part, Refusal)
            else pack_measured(part)
            if isinstance(part, Measured)
            else pack_frame(self._twisted(part) if part.client in liars else part)
            for part in parts
        )

    def _liars(self, clients: Sequence[int], server_round: int) -> set[int]:
        generator = np.random.default_rng(derive_seed("liars", self._seed, server_round))
        drawn = generator.choice(len(clients), int(LIARS * len(clients)), replace=False)
        return {clients[index] for index in drawn}

    def _twisted(self, frame: Frame) -> Frame:
        assert self._lie is not None
        seeds = uplink_seeds(self._seed, frame.server_round, frame.client)
        update = decode_values(frame.payload, frame.codec, self._groups, **seeds)
        generator = np.random.default_rng(derive_seed("lie", seeds["seed"]))
        twisted = self._lie(update, generator).astype(np.float32)
        if np.isfinite(twisted).all():
            payload = encode_values(twisted, frame.codec, self._groups, **seeds)
        else:  # the codec refuses to write it: a liar's own does not
            assert frame.codec == "float32", "NaN is sent by the lossless codec"
            payload = encode_float32(twisted)
        return replace(frame, payload=payload)


@dataclass(frozen=True)
class AttackCell(ExperimentCell):
    """Run one rule under one attack in this process."""

    rule: str = ""
    attack: str = "none"

    def run_in(self, folder: Path) -> Result:
        """Run the rounds; a run that learned nothing is a result too."""
        run = replace(self.experiment.run, out=str(folder))
        settings = replace(self.experiment, run=run)
        prepared = prepare(settings, Callback())
        assert isinstance(prepared, Prepared), "no search comes before it"
        liars = Liars(
            Node(NodeConfig.from_experiment(settings)).answer, prepared, ATTACKS[self.attack]
        )
        try:
            with quiet_flower():
                federate(LocalGrid({1: liars.answer}), prepared, RunFolder(folder), Callback())
        except RunError:
            if not (folder / "result.json").exists():
                raise
        result: Result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        return {**result, "attack": {"kind": self.attack, "liars": LIARS, "factor": FACTOR}}

    def show(self, result: Result) -> str:
        """Describe metric and refusals."""
        return f"{super().show(result)}, {len(result['refused'])} refused"


def cells(
    experiment: str, overrides: Sequence[str], results: Path, seed: int
) -> Iterator[AttackCell]:
    """Yield every rule under every attack."""
    for rule, parameters in STRATEGY_PARAMETERS.items():
        for attack in ATTACKS:
            settings = Experiment.from_file(
                experiment_file(experiment),
                (*SMALLER, *overrides, f"strategy.name={rule}", *parameters, f"run.seed={seed}"),
            )
            name = f"{rule}-{attack}"
            rate = Rate(settings.training.rate_of("lora-factors"), settings.training.learning_rates)
            path = results / f"{name}-seed{seed}.json"
            yield AttackCell(
                path, rate, seed, None, settings, name, FEDPET, rule=rule, attack=attack
            )


def summary(all_cells: Sequence[AttackCell]) -> dict[str, Any]:
    """Return the figures of the table by rule and attack."""
    table: dict[str, Any] = {}
    for cell in all_cells:
        result = cell.read()
        if result is not None:
            table.setdefault(cell.rule, {})[cell.attack] = {
                "final": result["quality"]["final"],
                "before": result["quality"]["before"],
                "refused": len(result["refused"]),
                "status": result["run"]["status"],
                "final_values_sha256": result["final_values_sha256"],
            }
    first = all_cells[0]
    return {
        "metric": first.experiment.data.metric,
        "rounds": first.experiment.strategy.num_rounds,
        "clients_per_round": first.experiment.strategy.clients_per_round,
        "liars": LIARS,
        "factor": FACTOR,
        "table": table,
    }


def as_text(found: dict[str, Any]) -> str:
    """Return the table in Markdown."""
    lines = [
        f"{found['metric']} after {found['rounds']} rounds, {found['liars']:.0%} of "
        f"{found['clients_per_round']} clients a round lie",
        "",
        "| rule | " + " | ".join(ATTACKS) + " |",
        "|---|" + "---:|" * len(ATTACKS),
    ]
    for rule in STRATEGY_PARAMETERS:
        shown = [found["table"].get(rule, {}).get(attack) for attack in ATTACKS]
        row = ["" if cell is None else show_metric(cell["final"]) for cell in shown]
        lines.append(f"| {rule} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attacks",
        description="Accuracy of four rules while a fifth of each round's clients lie.",
    )
    parser.add_argument("--out", type=Path, required=True, help="the table's figures, JSON")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the cells")
    parser.add_argument("--experiment", default="film-reviews")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--only", action="append", default=[], metavar="RULE-ATTACK")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    all_cells = list(cells(given.experiment, given.overrides, given.results, given.seed))
    names = [cell.method for cell in all_cells]
    for name in given.only:
        if name not in names:
            raise ConfigError(f"there is no cell {name!r}. Known are: {', '.join(names)}.")
    chosen = [cell for cell in all_cells if not given.only or cell.method in given.only]
    complete(chosen, lambda line: print(line, file=sys.stderr, flush=True))
    found = summary(all_cells)
    write_json(given.out, found)
    print(as_text(found))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on from here.", file=sys.stderr)
        sys.exit(130)
    except FedpetError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
