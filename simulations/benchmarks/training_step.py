"""What one local training step costs, by method: time and memory, in one process side by side.

    python -m simulations.benchmarks.training_step [--minutes 3] [--out FILE]

For each setting (model, rows x tokens) all methods are set up, then take turns, one step each, in a
new order each round, so that what else the machine does falls on all alike; rounds go on for some
minutes a setting, since a small step needs more of them. A step is forward, backward, optimiser and
whatever the method writes afterwards. Told are the medians of wall and of processor time, the
median over rounds of a step's time over that of `bitfit` in the same round, and

    persistent bytes   what the method holds between steps above the loaded model
    peak bytes         the most that is allocated at once during a step, on top of that

both counted by torch's profiler from every allocation, which is exact and the same each time.

`bitfit` is the floor of any method whose backward goes through all layers: forward pass and input
gradients, and next to nothing for weights. ", first token" is a method whose passes leave out what
the classifier never reads (`training.first-token-only`); ", oneDNN" is one whose dense layers are
multiplied by oneDNN (`training.products`), which the others are given too.
MPNet-base has random weights where its packages are not installed; time and memory do not depend
on them.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedpet.backbone import Backbone, load_backbone
from fedpet.config import BackboneConfig, MaskConfig
from fedpet.first_token import first_token_only
from fedpet.mask import build_mask
from fedpet.model import PetModel
from fedpet.positions import find_positions, mask_scope
from fedpet.simulations.run_folder import machine, versions
from fedpet.structure import preset
from simulations.benchmarks.onednn_layers import multiply_by_onednn

SETTINGS = (("minilm", 32, 32), ("minilm", 16, 128), ("mpnet-base", 8, 128))
DENSITIES = (0.001, 0.005, 0.02, 0.05)
LEAST_ROUNDS = 5
FLOOR = "bitfit"
FIRST_TOKEN = ", first token"  # of methods whose passes training.first-token-only cuts
ONEDNN = ", oneDNN"  # of methods whose dense layers oneDNN multiplies
Step = Callable[[], None]


Method = Callable[[Backbone], tuple[Any, Iterable[nn.Parameter], Step, Step]]


def methods() -> dict[str, Method]:
    """By name: backbone -> (model, what to optimise, set gradients to zero, after a step)."""
    table: dict[str, Method] = {
        "full": lambda base: _plain(base, lambda name: True),
        "full" + ONEDNN: lambda base: _plain(base, lambda name: True, onednn=True),
        "bitfit": lambda base: _plain(base, _is_bias),
        "bitfit" + ONEDNN: lambda base: _plain(base, _is_bias, onednn=True),
        "peft-lora": _peft_lora,
        "peft-lora" + ONEDNN: lambda base: _peft_lora(base, onednn=True),
        "peft-shira": _peft_shira,
        "peft-shira" + ONEDNN: lambda base: _peft_shira(base, onednn=True),
    }
    fedpet = {f"fedpet-mask-{100 * d:g}%": partial(_fedpet, density=d) for d in DENSITIES}
    fedpet["fedpet-default"] = partial(_fedpet, density=0.001, names="lora-factors+lnfit")
    table |= fedpet
    for name in ("fedpet-mask-0.5%", "fedpet-default"):
        table[name + FIRST_TOKEN] = fedpet[name]
        table[name + FIRST_TOKEN + ONEDNN] = partial(fedpet[name], products="onednn")
    return table


def measure(
    model: str, rows: int, tokens: int, threads: int, minutes: float, names: list[str]
) -> list[dict[str, Any]]:
    """One setting: a table row for each method."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    base = _backbone(model)
    vocabulary = base.model.config.vocab_size
    ids = torch.randint(5, vocabulary, (rows, tokens), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = torch.randint(0, 2, (rows,), generator=generator)
    steps, memory, trained = {}, {}, {}
    for name in names:
        fresh = copy.deepcopy(base)
        gc.collect()  # what an earlier method left in cycles is not given back within a count
        with Allocations() as persistent:
            adapted, parameters, zero, after = methods()[name](fresh)
            parameters = list(parameters)
            optimiser = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
            cut = FIRST_TOKEN in name

            def step(
                adapted: Any = adapted,
                cut: bool = cut,
                optimiser: torch.optim.Optimizer = optimiser,
                zero: Step = zero,
                after: Step = after,
            ) -> None:
                zero()
                with first_token_only(adapted, inputs) if cut else nullcontext():
                    nn.functional.cross_entropy(adapted(**inputs).logits, labels).backward()
                optimiser.step()
                after()

            step()
        with Allocations() as one:
            step()
        steps[name] = step
        trained[name] = sum(p.numel() for p in parameters)
        memory[name] = (persistent.left, one.peak)
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    finish = time.monotonic() + 60 * minutes
    rounds = 0
    while time.monotonic() < finish or rounds < LEAST_ROUNDS:
        rounds += 1
        for name in order.sample(names, len(names)):
            step = steps[name]
            started, started_cpu = time.perf_counter(), time.process_time()
            step()
            wall[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - started_cpu)
    return [
        {
            "model": model,
            "rows": rows,
            "tokens": tokens,
            "threads": threads,
            "method": name,
            "trained_values": trained[name],
            "rounds": rounds,
            "step_seconds": round(statistics.median(wall[name]), 5),
            "step_cpu_seconds": round(statistics.median(cpu[name]), 5),
            "of_floor": _ratio(wall[name], wall.get(FLOOR)),
            "of_floor_cpu": _ratio(cpu[name], cpu.get(FLOOR)),
            "persistent_bytes": memory[name][0],
            "peak_bytes": memory[name][1],
        }
        for name in names
    ]


def _ratio(seconds: list[float], floor: list[float] | None) -> float | None:
    """The median over rounds of one method's time over the floor's in the same round."""
    if floor is None:
        return None
    return round(statistics.median(a / b for a, b in zip(seconds, floor, strict=True)), 4)


class Allocations:
    """Counts what torch allocates on the CPU: what is left at the end, and the most at once."""

    def __enter__(self) -> Allocations:
        self._profile = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        )
        self._profile.__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        self._profile.__exit__(*failure)
        results: Any = self._profile.profiler.kineto_results  # type: ignore[union-attr]
        events = [event for event in results.events() if event.name() == "[memory]"]
        self.left = self.peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            self.left += event.nbytes()
            self.peak = max(self.peak, self.left)


def _backbone(model: str) -> Backbone:
    if model == "minilm":
        return load_backbone(BackboneConfig(), num_outputs=2)
    from transformers import MPNetConfig, MPNetForSequenceClassification

    torch.manual_seed(0)
    mpnet = MPNetForSequenceClassification(MPNetConfig()).eval().requires_grad_(False)
    head = tuple(name for name, _ in mpnet.named_parameters() if name.startswith("classifier"))
    return Backbone(model, Path("."), mpnet, head, "")


def _is_bias(name: str) -> bool:
    return name.endswith("bias") and "norm" not in name.lower() and "relative" not in name


def _plain(base: Backbone, trains: Callable[[str], bool], *, onednn: bool = False) -> Any:
    for name, parameter in base.model.named_parameters():
        parameter.requires_grad_(trains(name) or name in base.head)
    return _trained_by_torch(base.model, onednn)


def _trained_by_torch(model: Any, onednn: bool) -> Any:
    if onednn:
        multiply_by_onednn(model)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def zero() -> None:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()

    return model, parameters, zero, lambda: None


def _names(base: Backbone, *roles: str) -> list[str]:
    positions = find_positions(base.model, base.head)
    dense = [p for p in positions if p.kind == "linear" and p.role != "pooler"]
    return [p.name for p in dense if not roles or p.role in roles]


def _peft_lora(base: Backbone, *, onednn: bool = False) -> Any:
    from peft import LoraConfig, get_peft_model

    names = _names(base, "query", "value")
    config = LoraConfig(r=8, lora_alpha=16, target_modules=names, modules_to_save=["classifier"])
    return _trained_by_torch(get_peft_model(base.model, config).eval(), onednn)


def _peft_shira(base: Backbone, *, onednn: bool = False) -> Any:
    """Of all dense weights, with the rank whose number of values is nearest to the 0.5 % mask's."""
    from peft import ShiraConfig, get_peft_model

    names = _names(base)
    sizes = [tuple(base.model.get_parameter(f"{name}.weight").shape) for name in names]
    wanted = 0.005 * sum(first * second for first, second in sizes)
    rank = max(1, round(wanted / sum(first + second for first, second in sizes)))
    config = ShiraConfig(r=rank, target_modules=names, modules_to_save=["classifier"])
    return _trained_by_torch(get_peft_model(base.model, config).eval(), onednn)


def _fedpet(base: Backbone, density: float, names: str = "none", products: str = "torch") -> Any:
    mask = None
    if density:
        mask = build_mask(mask_scope(base.model, base.head), MaskConfig(density=density))
    positions = find_positions(base.model, base.head)
    structure = preset(names, positions, rank=8, scale=2.0)
    pet = PetModel(base, mask, structure, seed=0, products=products)
    return pet.model, pet.parameter_groups().values(), pet.zero_grad, pet.after_step


def _table(rows: list[dict[str, Any]]) -> str:
    lines = []
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(_setting(row), []).append(row)
    for (model, batch, tokens, threads), group in groups.items():
        lines += [f"{model}, {batch} rows x {tokens} tokens, {threads} thread(s)"]
        for row in group:
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
    parser.add_argument("--minutes", type=float, default=3, help="of rounds, for each setting")
    parser.add_argument("--settings", nargs="+", default=[f"{m}:{r}x{t}" for m, r, t in SETTINGS])
    parser.add_argument("--methods", nargs="+", default=list(methods()))
    parser.add_argument("--out", type=Path, help="settings it holds and that are not named stay")
    options = parser.parse_args(arguments)
    here = {"schema": 1, "machine": machine(), "versions": versions()}
    rows: list[dict[str, Any]] = []
    for setting in options.settings:
        model, _, size = setting.partition(":")
        batch, _, tokens = size.partition("x")
        for threads in options.threads:
            rows += measure(
                model, int(batch), int(tokens), threads, options.minutes, options.methods
            )
            print(_table(rows[-len(options.methods) :]), flush=True)
    if options.out is not None:
        rows = _others(options.out, rows, here) + rows
        text = json.dumps({**here, "rows": rows}, indent=1) + "\n"
        options.out.write_text(text, encoding="utf-8")


def _others(path: Path, rows: list[dict[str, Any]], here: dict[str, Any]) -> list[dict[str, Any]]:
    """What the file holds of settings that `rows` are not of, measured on the same machine."""
    if not path.exists():
        return []
    before = json.loads(path.read_text(encoding="utf-8"))
    if any(before[key] != value for key, value in here.items()):
        return []
    measured = {_setting(row) for row in rows}
    return [row for row in before["rows"] if _setting(row) not in measured]


def _setting(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["rows"], row["tokens"], row["threads"]


if __name__ == "__main__":
    main()
