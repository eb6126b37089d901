"""Measure one search step against a plain training step of the same candidates.

    python -m benchmarks.search_step [--rounds 7] [--out FILE]

All methods are set up in one process and take turns, one step each, so that other work on the
machine falls on all alike:

    plain         forward, backward, AdamW and the values' writing, every candidate fully on
    gated         the same with a gate on every candidate, as step 5 of a search
    first-order   a search step without the unrolled part: two passes
    second-order  the whole search step: five passes, three writings of a virtual copy

Reported are the medians of wall and of CPU time, the median over rounds of a step's CPU time over
that of `plain` in the same round, and the bytes that each holds between steps and allocates at most
during one, counted by torch's profiler from every allocation; of a search's bytes beyond `plain`,
also as multiples of the candidates' values. A second backbone would be the model's own bytes
more.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.allocations import Allocations
from fedpet.backbone.pretrained import Backbone, load_backbone
from fedpet.config import BackboneConfig
from fedpet.pet.model import PetModel
from fedpet.run.run_folder import machine, versions
from fedpet.search import BiLevel, SearchConfig, Space, build_space

BAR = 5.5  # plain steps that a search step may cost
SPACES = ("mergeable", "s3pet-mix", "s3pet-lora")
Batch = dict[str, torch.Tensor]


def make_plain(backbone: Backbone, space: Space, batch: Batch, gated: bool) -> Callable[[], None]:
    """Make a plain training step of a model with all candidates on it."""
    pet = PetModel(backbone, None, space.structure(), seed=0)
    if gated:
        pet.set_gates(torch.full((len(space.candidates),), 0.1))
    optimiser = torch.optim.AdamW(pet.parameter_groups().values(), lr=1e-4)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}

    def step() -> None:
        pet.zero_grad()
        nn.functional.cross_entropy(pet.model(**inputs).logits, batch["labels"]).backward()
        nn.utils.clip_grad_norm_(pet.parameter_groups().values(), 2.0)
        optimiser.step()
        pet.after_step()

    return step


def _loss(model: Any, inputs: Any, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(**inputs).logits, labels)


def make_search(
    backbone: Backbone, space: Space, batches: tuple[Batch, Batch], order: str
) -> Callable[[], None]:
    """Make a search step."""
    config = SearchConfig(
        space=space.name, budget=space.num_values // 10, learning_rate=1e-4, order=order
    )
    pet = PetModel(backbone, None, space.structure(), seed=0)
    search = BiLevel(pet, space, config, total_steps=10**6, loss=_loss)

    def step() -> None:
        search.step(*batches)

    return step


def measure(base: Backbone, space_name: str, rows: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Measure one space and size of batch: a table row for each kind of step."""
    space = build_space(base.model, space_name, head=base.head)
    batches = _batch(base, rows, tokens, 0), _batch(base, rows, tokens, 1)
    makers: dict[str, Callable[[Backbone], Callable[[], None]]] = {
        "plain": lambda b: make_plain(b, space, batches[0], False),
        "gated": lambda b: make_plain(b, space, batches[0], True),
        "first-order": lambda b: make_search(b, space, batches, "first"),
        "second-order": lambda b: make_search(b, space, batches, "second"),
    }
    steps, memory = {}, {}
    for name, make in makers.items():
        fresh = copy.deepcopy(base)
        with Allocations() as held:
            step = make(fresh)
            step()
        with Allocations() as one:
            step()
        steps[name], memory[name] = step, (held.left, one.peak)
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    wall: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            started, started_cpu = time.perf_counter(), time.process_time()
            step()
            wall[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - started_cpu)
    pet = PetModel(copy.deepcopy(base), None, space.structure(), seed=0)
    values = sum(group.numel() for group in pet.parameter_groups().values())
    return {
        "space": space_name,
        "candidates": len(space.candidates),
        "trained_bytes": 4 * values,
        "backbone_bytes": 4 * sum(p.numel() for p in base.model.parameters()),
        "rows": rows,
        "tokens": tokens,
        "steps": {
            name: {
                "cpu_seconds": round(statistics.median(cpu[name]), 5),
                "wall_seconds": round(statistics.median(wall[name]), 5),
                "plain_steps": round(
                    statistics.median(a / b for a, b in zip(cpu[name], cpu["plain"], strict=True)),
                    3,
                ),
                "persistent_bytes": memory[name][0],
                "peak_bytes": memory[name][1],
                "times_the_values_more": round(
                    (sum(memory[name]) - sum(memory["plain"])) / (4 * values), 2
                ),
            }
            for name in steps
        },
    }


def _batch(base: Backbone, rows: int, tokens: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, base.model.config.vocab_size, (rows, tokens), generator=generator)
    labels = torch.randint(0, 2, (rows,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _table(row: dict[str, Any]) -> str:
    lines = [
        f"{row['space']}: {row['candidates']} candidates, {row['trained_bytes'] / 1e6:.2f} MB of "
        f"values on {row['backbone_bytes'] / 1e6:.0f} MB, {row['rows']} rows x {row['tokens']}"
    ]
    for name, step in row["steps"].items():
        lines.append(
            f"  {name:<13}{1e3 * step['cpu_seconds']:8.0f} ms{step['plain_steps']:7.2f} plain steps"
            f"{step['persistent_bytes'] / 1e6:8.2f} MB held{step['peak_bytes'] / 1e6:8.2f} at once"
            f"{step['times_the_values_more']:7.1f} x the values more than plain"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; `--out` keeps the numbers. 1 where a search step costs too much."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--spaces", nargs="+", default=list(SPACES))
    parser.add_argument("--rounds", type=int, default=7, help="steps of each kind")
    parser.add_argument("--batch", default="32x32", help="rows x tokens")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    base = load_backbone(BackboneConfig(model=options.model), num_outputs=2)
    rows, tokens = (int(part) for part in options.batch.split("x"))
    found = []
    for space in options.spaces:
        found.append(measure(base, space, rows, tokens, options.rounds))
        print(_table(found[-1]), flush=True)
    missed = [row["space"] for row in found if row["steps"]["second-order"]["plain_steps"] > BAR]
    if missed:
        print(f"Above {BAR} plain steps: {', '.join(missed)}.")
    if options.out is not None:
        report = {
            "schema": 1,
            "benchmark": "search_step",
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "status": "missed" if missed else "ok",
            "threads": 1,
            "bar_plain_steps": BAR,
            "machine": machine(),
            "versions": versions(),
            "rows": found,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
