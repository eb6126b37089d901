"""Measure one local training step by method: time and memory, side by side in one run.

    python -m benchmarks.training_step [--minutes 2] [--out FILE]

Each method has processes of its own, as a client has, so that no other's memory and caches count.
The layout of memory in one process is worth some percent of its steps all along, so there are
several, one behind the other. For each setting (model, rows x tokens, threads) the
methods take turns, one step each, in a new order each round, while the others sleep, so that other
work on the machine falls on all alike; rounds go on for some minutes, since a small step needs
more of them. Some methods take turns, then the next ones, the floor among all: all at once would
not fit in the memory of a small machine. A step is forward, backward, optimiser and whatever the
method writes afterwards. Reported are the medians of wall and of processor time, the median over
rounds of a step's time over that of `bitfit` in the same round, and

    persistent bytes   held by the method between steps, above the loaded model
    peak bytes         the most that is allocated at once during a step, on top of that

both counted by torch's profiler from every allocation, which is exact and the same each time.

`bitfit` is the floor of any method whose backward goes through all layers: forward pass and input
gradients, and next to nothing for weights. The methods stand in `step_methods.py`.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import multiprocessing
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.allocations import Allocations
from benchmarks.step_methods import FIRST_TOKEN, ONEDNN, backbone, methods
from fedpet.run.run_folder import machine, versions
from fedpet.training.cls_only import first_token_only

SETTINGS = (("minilm", 32, 32), ("minilm", 16, 128), ("mpnet-base", 8, 128))
LEAST_ROUNDS = 4  # of each process
AT_ONCE = 6  # methods that take turns, beside the floor
PAUSE = 0.02  # s before a step: threads that have just worked wait awake for a while
FLOOR = "bitfit"


class _Trainer:
    """Run one method on one model, in a process of its own."""

    def __init__(self, model: str, name: str) -> None:
        self._name = name
        self._base = backbone(model)
        self._passes = ExitStack()
        self._persistent: int | None = None
        self._peaks: dict[tuple[int, int], int] = {}  # by rows and tokens

    def prepare(self, rows: int, tokens: int, threads: int) -> dict[str, int]:
        """Take steps of this size from now on; what the method trains and holds."""
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(0)
        vocabulary = self._base.model.config.vocab_size
        ids = torch.randint(5, vocabulary, (rows, tokens), generator=generator)
        self._inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        self._labels = torch.randint(0, 2, (rows,), generator=generator)
        if self._persistent is None:
            gc.collect()
            with Allocations() as held:
                self._build(self._inputs)
                self.step()
            self._persistent = held.left
        self.step()
        if (rows, tokens) not in self._peaks:
            with Allocations() as one:
                self.step()
            self._peaks[rows, tokens] = one.peak
        return {
            "trained_values": sum(p.numel() for p in self._parameters),
            "persistent_bytes": self._persistent,
            "peak_bytes": self._peaks[rows, tokens],
        }

    def _build(self, inputs: dict[str, Tensor]) -> None:
        self._model, parameters, self._zero, self._after = methods()[self._name](self._base)
        self._parameters = list(parameters)
        self.make_optimizer = torch.optim.AdamW(self._parameters, lr=1e-4, fused=True)
        if FIRST_TOKEN in self._name:
            self._passes.enter_context(first_token_only(self._model, inputs))

    def step(self) -> tuple[float, float]:
        """Wall and processor seconds of one step."""
        started, started_cpu = time.perf_counter(), time.process_time()
        self._zero()
        logits = self._model(**self._inputs).logits
        nn.functional.cross_entropy(logits, self._labels).backward()
        self.make_optimizer.step()
        self._after()
        return time.perf_counter() - started, time.process_time() - started_cpu


def _serve(pipe: Connection, model: str, name: str) -> None:
    """Prepare for each setting that comes, and take a step for each None."""
    trainer = _Trainer(model, name)
    while (order := pipe.recv()) != "stop":
        pipe.send(trainer.step() if order is None else trainer.prepare(*order))


class Trainers:
    """Run the processes of all methods on one model."""

    def __init__(self, model: str, names: list[str]) -> None:
        context = multiprocessing.get_context("spawn")
        self.names = names
        self._pipes: dict[str, Connection] = {}
        self._processes = []
        # Whoever starts later may find worse memory: in a new order each time.
        for name in random.sample(names, len(names)):
            self._pipes[name], theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, model, name), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)

    def __enter__(self) -> Trainers:
        return self

    def __exit__(self, *failure: Any) -> None:
        for pipe, process in zip(self._pipes.values(), self._processes, strict=True):
            if any(failure):
                process.terminate()
            else:
                pipe.send("stop")
            process.join()

    def ask(self, name: str, order: tuple[int, int, int] | None) -> Any:
        """Return a process's answer; None asks for a step.

        Raises:
            EOFError: The process died; it has said why.
        """
        pipe = self._pipes[name]
        pipe.send(order)
        return pipe.recv()


@dataclass
class Timings:
    """Hold a setting's steps, of all processes that took them."""

    held: dict[str, dict[str, int]] = field(default_factory=dict)  # by method
    wall: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    cpu: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, trainers: Trainers, size: tuple[int, int, int], minutes: float) -> None:
        """Steps of this size, (rows, tokens, threads), each method's once a round."""
        names = trainers.names
        self.held = {name: trainers.ask(name, size) for name in names}
        finish, rounds = time.monotonic() + 60 * minutes, 0
        while time.monotonic() < finish or rounds < LEAST_ROUNDS:
            rounds += 1
            for name in random.sample(names, len(names)):
                time.sleep(PAUSE)
                seconds, of_cpu = trainers.ask(name, None)
                self.wall[name].append(seconds)
                self.cpu[name].append(of_cpu)

    def rows(self, model: str, size: tuple[int, int, int], processes: int) -> list[dict[str, Any]]:
        """Return a table row for each method."""
        wall, cpu = self.wall, self.cpu
        return [
            {
                "model": model,
                "rows": size[0],
                "tokens": size[1],
                "threads": size[2],
                "method": name,
                "trained_values": held["trained_values"],
                "processes": processes,
                "rounds": len(wall[name]),
                "step_seconds": round(statistics.median(wall[name]), 5),
                "step_cpu_seconds": round(statistics.median(cpu[name]), 5),
                "of_floor": _ratio(wall[name], wall.get(FLOOR)),
                "of_floor_cpu": _ratio(cpu[name], cpu.get(FLOOR)),
                "persistent_bytes": held["persistent_bytes"],
                "peak_bytes": held["peak_bytes"],
            }
            for name, held in self.held.items()
        ]


def _ratio(seconds: list[float], floor: list[float] | None) -> float | None:
    """Return the median over rounds of one method's time over the floor's in the same round."""
    if floor is None:
        return None
    return round(statistics.median(a / b for a, b in zip(seconds, floor, strict=True)), 4)


def _table(rows: list[dict[str, Any]]) -> str:
    """Return the rows of one setting."""
    model, batch, tokens, threads = _setting(rows[0])
    lines = [f"{model}, {batch} rows x {tokens} tokens, {threads} thread(s)"]
    for row in rows:
        lines.append(
            f"  {row['method']:<39} {1e3 * row['step_seconds']:9.1f} ms"
            f" {row['of_floor'] or math.nan:6.2f} x {FLOOR}"
            f" ({row['of_floor_cpu'] or math.nan:.2f} of processor time)"
            f" {row['persistent_bytes'] / 1e6:9.2f} MB held"
            f" {row['peak_bytes'] / 1e6:9.2f} MB at once"
            f" {row['trained_values']:>11,} values"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure and print; `--out` keeps the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--minutes", type=float, default=2, help="of rounds, a setting and heat")
    parser.add_argument("--processes", type=int, default=3, help="one behind the other, a method")
    parser.add_argument("--settings", nargs="+", default=[f"{m}:{r}x{t}" for m, r, t in SETTINGS])
    parser.add_argument("--methods", nargs="+", default=list(methods()))
    parser.add_argument("--out", type=Path, help="what it holds of other rows stays")
    options = parser.parse_args(arguments)
    here = {"schema": 1, "machine": machine(), "versions": versions()}
    rows: list[dict[str, Any]] = []
    minutes = options.minutes / options.processes
    settings = [setting.partition(":") for setting in options.settings]
    for model, group in itertools.groupby(settings, key=lambda setting: setting[0]):
        shapes = [tuple(map(int, shape.split("x"))) for _, _, shape in group]
        sizes = [(*shape, threads) for shape in shapes for threads in options.threads]
        for heat in _heats(options.methods):
            timings: dict[tuple[int, int, int], Timings] = {size: Timings() for size in sizes}
            for _ in range(options.processes):
                with Trainers(model, heat) as trainers:
                    for size, timing in timings.items():
                        timing.add(trainers, size, minutes)
            for size, timing in timings.items():
                measured = timing.rows(model, size, options.processes)
                print(_table(measured), flush=True)
                rows += measured
            if options.out is not None:
                _keep(options.out, rows, here)


def _heats(names: list[str]) -> Iterator[list[str]]:
    """Group methods that take turns with each other: by their products, the floor with each."""
    floor = [FLOOR] if FLOOR in names else []
    others = [name for name in names if name != FLOOR]
    for onednn in (False, True):
        alike = [name for name in others if (ONEDNN in name) == onednn]
        for start in range(0, len(alike), AT_ONCE):
            yield floor + alike[start : start + AT_ONCE]
    if not others:
        yield floor


def _keep(path: Path, rows: list[dict[str, Any]], here: dict[str, Any]) -> None:
    """Write the rows, each setting and method once, with what the file holds of others.

    What was measured on another machine or with other versions goes.
    """
    order = list(methods())
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        kept.setdefault(_key(row), row)  # the floor's first one
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if all(before[key] == value for key, value in here.items()):
            kept = {**{_key(row): row for row in before["rows"]}, **kept}
    settings = list(dict.fromkeys(key[:-1] for key in kept))
    ordered = sorted(kept, key=lambda key: (settings.index(key[:-1]), order.index(key[-1])))
    text = json.dumps({**here, "rows": [kept[key] for key in ordered]}, indent=1) + "\n"
    path.write_text(text, encoding="utf-8")


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return (*_setting(row), row["method"])


def _setting(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["rows"], row["tokens"], row["threads"]


if __name__ == "__main__":
    main()
