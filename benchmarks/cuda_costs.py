"""Measure steps on a GPU, and their parts: methods, kernels, the rotation."""

from __future__ import annotations

import functools
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.cuda_models import (
    VOCABULARY,
    Place,
    batch_of,
    fresh_backbone,
    mask_of,
    noted,
    pet_model,
    random_model,
)
from fedpet.backbone.pretrained import Backbone
from fedpet.codec import VectorCodec
from fedpet.codec.rotation import Rotation
from fedpet.codec.torch_rotation import rotate_updates
from fedpet.training.cls_only import first_token_only

Step = Callable[[], None]
FIRST_TOKEN = ", first token"


def _fedpet(base: Backbone, density: float, names: str = "none") -> tuple[Any, Any, Step, Step]:
    pet = pet_model(base, mask_of(base.source, density) if density else None, names)
    return pet.model, list(pet.parameter_groups().values()), pet.zero_grad, pet.after_step


def _plain(base: Backbone, trains: Callable[[str], bool]) -> tuple[Any, Any, Step, Step]:
    for name, parameter in base.model.named_parameters():
        parameter.requires_grad_(trains(name) or name in base.head)
    return _by_torch(base.model)


def _peft_lora(base: Backbone) -> tuple[Any, Any, Step, Step]:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["classifier"]
    )
    return _by_torch(get_peft_model(base.model, config).eval())


def _by_torch(model: Any) -> tuple[Any, Any, Step, Step]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def zero() -> None:
        for parameter in parameters:
            parameter.grad = None

    return model, parameters, zero, lambda: None


METHODS: dict[str, Callable[[Backbone], tuple[Any, Any, Step, Step]]] = {
    "mask-0.5%": lambda base: _fedpet(base, 0.005),
    "full": lambda base: _plain(base, lambda name: True),
    "bitfit (torch)": lambda base: _plain(base, lambda name: name.endswith("bias")),
    "mask-0.5%" + FIRST_TOKEN: lambda base: _fedpet(base, 0.005),
    "peft-lora": _peft_lora,
    "default: mask-0.1%, lora-factors+lnfit" + FIRST_TOKEN: lambda base: _fedpet(
        base, 0.001, "lora-factors+lnfit"
    ),
    "mask-0.1%": lambda base: _fedpet(base, 0.001),
    "mask-5%": lambda base: _fedpet(base, 0.05),
    "lora": lambda base: _fedpet(base, 0.0, "lora"),
    "bitfit": lambda base: _fedpet(base, 0.0, "bitfit"),
    "mask-2%": lambda base: _fedpet(base, 0.02),
}
SETTINGS = (
    ("minilm", 32, 32),
    ("bert-base", 32, 128),
    ("minilm", 16, 128),
    ("bert-base", 8, 128),
)
WARM = 6
LEAST_STEPS, MOST_STEPS = 8, 80


@dataclass
class Stepper:
    """Take steps of one method on one model."""

    place: Place
    method: str
    base: Backbone
    inputs: dict[str, Tensor]
    labels: Tensor
    autocast: bool = False

    def __post_init__(self) -> None:
        made = METHODS[self.method](self.base)
        self.model, self.parameters, self.zero, self.after = made
        self.optimiser = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)
        self._passes = ExitStack()
        if FIRST_TOKEN in self.method:
            self._passes.enter_context(first_token_only(self.model, self.inputs))

    def forward(self) -> Tensor:
        """Return the loss."""
        cast = torch.autocast(self.place.device, torch.bfloat16) if self.autocast else nullcontext()
        with cast:
            logits = self.model(**self.inputs).logits
        return nn.functional.cross_entropy(logits.float(), self.labels)

    def step(self) -> None:
        """Take a whole step."""
        self.zero()
        self.forward().backward()
        self.optimiser.step()
        self.after()

    def close(self) -> None:
        """Let go of it all."""
        self._passes.close()


def _timed(place: Place, work: Callable[[], Any], seconds: float) -> list[float]:
    """Return wall seconds of repeated calls, each waited for."""
    times: list[float] = []
    finish = time.monotonic() + seconds
    while len(times) < LEAST_STEPS or (time.monotonic() < finish and len(times) < MOST_STEPS):
        place.synchronise()
        started = time.perf_counter()
        work()
        place.synchronise()
        times.append(time.perf_counter() - started)
    return times


def _stepper(place: Place, method: str, size: str, rows: int, tokens: int, **more: Any) -> Stepper:
    base = fresh_backbone(size, place.device)
    return Stepper(place, method, base, *batch_of(rows, tokens, place.device, VOCABULARY), **more)


def _measured(place: Place, stepper: Stepper, before: int, seconds: float) -> dict[str, Any]:
    for _ in range(1 if place.tiny else WARM):
        stepper.step()
    row: dict[str, Any] = {"values": sum(p.numel() for p in stepper.parameters)}
    if place.device == "cuda":
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        stepper.step()
        torch.cuda.synchronize()
        row["held_MB"] = round((held - before) / 1e6, 2)
        row["step_peak_MB"] = round((torch.cuda.max_memory_allocated() - held) / 1e6, 2)
        row["peak_MB"] = round(torch.cuda.max_memory_allocated() / 1e6, 2)
    times = _timed(place, stepper.step, seconds)
    row["step_ms"] = round(1e3 * statistics.median(times), 3)
    row["least_ms"] = round(1e3 * min(times), 3)
    row["steps"] = len(times)
    if place.device == "cuda":  # not waited for each: what a loop without prints reaches
        started = time.perf_counter()
        for _ in range(20):
            stepper.step()
        launched = time.perf_counter() - started
        torch.cuda.synchronize()
        row["in_a_row_ms"] = round(50 * (time.perf_counter() - started), 3)
        row["launched_ms"] = round(50 * launched, 3)  # by Python, whatever the GPU still has to do
    return row


@functools.cache
def _warm_up(device: str) -> None:
    """Let the libraries take the memory that they keep, so that it is no method's."""
    x = torch.randn(64, 64, device=device, requires_grad=True)
    linear = nn.Linear(64, 64, device=device)
    for _ in range(2):
        linear(x).square().sum().backward()


def _clear(place: Place) -> int:
    """Give memory back; return the bytes that stay."""
    _warm_up("cpu" if place.tiny else place.device)
    gc.collect()
    if place.device != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def _cell(
    place: Place, name: str, size: str, rows: int, tokens: int, method: str, **more: Any
) -> None:
    with noted(place, name):
        before = _clear(place)
        stepper = _stepper(place, method, size, rows, tokens, **more)
        size_bytes = sum(p.nbytes for p in random_model(size, VOCABULARY).parameters())
        row = _measured(place, stepper, before + size_bytes, 0.05 if place.tiny else 1.0)
        stepper.close()
        del stepper
        place.found(name, row)


def steps(place: Place) -> None:
    """Measure a training step's time and memory, by method."""
    settings: Iterable[tuple[str, int, int]] = SETTINGS
    if place.tiny:
        settings = [("tiny", 4, 16)]
    for size, rows, tokens in settings:
        for method in METHODS:
            if place.left() < 8:
                place.found("left out for want of time", f"{size} {rows}x{tokens} {method} and on")
                return
            _cell(place, f"{size} {rows}x{tokens} {method}", size, rows, tokens, method)


def precision(place: Place) -> None:
    """Measure steps with bfloat16 passes, and with TF32 products."""
    size, rows, tokens = ("tiny", 4, 16) if place.tiny else ("bert-base", 32, 128)
    methods = ("mask-0.5%", "full", "peft-lora", "bitfit (torch)")
    for kind in ("bfloat16", "tf32"):
        torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
        for method in methods:
            if place.left() < 6:
                return
            name = f"{size} {rows}x{tokens} {method}, {kind}"
            _cell(place, name, size, rows, tokens, method, autocast=kind == "bfloat16")


def profile(place: Place) -> None:
    """Profile steps by their parts and kernels."""
    from torch.profiler import ProfilerActivity

    cuda = place.device == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    settings = [("tiny", 4, 16)] if place.tiny else [("minilm", 32, 32), ("bert-base", 32, 128)]
    for size, rows, tokens in settings:
        for method in ("mask-0.5%", "bitfit (torch)", "full"):
            name = f"{size} {rows}x{tokens} {method}"
            if place.left() < 6:
                return
            with noted(place, name):
                _clear(place)
                stepper = _stepper(place, method, size, rows, tokens)
                for _ in range(WARM):
                    stepper.step()
                place.found(f"{name}: parts", _parts(place, stepper))
                count = 10
                place.synchronise()
                with torch.profiler.profile(activities=activities) as seen:
                    for _ in range(count):
                        stepper.step()
                    place.synchronise()
                place.found(f"{name}: profile", _tops(seen.key_averages(), count))


def _parts(place: Place, stepper: Stepper) -> dict[str, float]:
    """Milliseconds of a step's parts, each waited for: the median of 15."""
    times: dict[str, list[float]] = {}

    def part(name: str, work: Callable[[], Any]) -> Any:
        place.synchronise()
        started = time.perf_counter()
        result = work()
        launched = time.perf_counter()
        place.synchronise()
        times.setdefault(name, []).append(time.perf_counter() - started)
        times.setdefault(f"{name}, launched", []).append(launched - started)
        return result

    for _ in range(15):
        part("zero", stepper.zero)
        loss = part("forward", stepper.forward)
        part("backward", loss.backward)
        part("optimiser", stepper.optimiser.step)
        part("after", stepper.after)
    return {name: round(1e3 * statistics.median(all_), 4) for name, all_ in times.items()}


def _tops(events: Any, steps: int) -> dict[str, Any]:
    """Return the first entries of a profile, by kernel, by operation, and by processor time."""
    real = [event for event in events if not getattr(event, "is_user_annotation", False)]
    kernels = [event for event in real if event.device_type.name != "CPU"]
    calls = [event for event in real if event.device_type.name == "CPU"]

    def rows(of: list[Any], key: str, most: int = 16) -> list[dict[str, Any]]:
        ordered = sorted(of, key=lambda event: -getattr(event, key))[:most]
        return [
            {
                "name": event.key[:90],
                "us_a_step": round(getattr(event, key) / steps, 1),
                "calls_a_step": round(event.count / steps, 1),
            }
            for event in ordered
            if getattr(event, key)
        ]

    counts = {
        event.key: round(event.count / steps, 1)
        for event in calls
        if event.key.startswith(("cuda", "cu")) and event.key != "cudaGetDeviceProperties"
    }
    return {
        "gpu_us_a_step": round(sum(event.self_device_time_total for event in kernels) / steps, 1),
        "cpu_us_a_step": round(sum(event.self_cpu_time_total for event in calls) / steps, 1),
        "kernels_a_step": round(sum(event.count for event in kernels) / steps, 1),
        "calls_of_the_driver_a_step": counts,
        "by_kernel": rows(kernels, "self_device_time_total"),
        "by_operation": rows(calls, "self_device_time_total"),
        "by_cpu": rows(calls, "self_cpu_time_total"),
    }


def sampled(place: Place) -> None:
    """Measure the weight's gradient at the mask's positions: sampled, dense, and other ways."""
    shapes = [(1024, 384, 1536), (2048, 768, 3072), (4096, 768, 3072), (2048, 768, 768)]
    if place.tiny:
        shapes = [(64, 32, 48)]
    for tokens, inner, outer in shapes:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(tokens, inner, generator=generator).to(place.device)
        g = torch.randn(tokens, outer, generator=generator).to(place.device)
        for density in (0.001, 0.005, 0.01, 0.02, 0.05):
            name = f"{tokens} tokens, {inner}->{outer}, {100 * density:g} %"
            if place.left() < 5:
                return
            with noted(place, name):
                place.found(name, _sampled(place, x, g, density))


def _sampled(place: Place, x: Tensor, g: Tensor, density: float) -> dict[str, Any]:
    rows, columns = g.shape[1], x.shape[1]
    count = max(int(density * rows * columns), 1)
    generator = torch.Generator().manual_seed(2)
    flat = torch.randperm(rows * columns, generator=generator)[:count].sort().values
    row, column = flat // columns, flat % columns
    crow = torch.zeros(rows + 1, dtype=torch.int64)
    crow[1:] = torch.bincount(row, minlength=rows).cumsum(0)
    flat, row, column = (tensor.to(place.device) for tensor in (flat, row, column))
    pattern = torch.sparse_csr_tensor(
        crow.to(place.device, torch.int32),
        column.to(torch.int32),
        torch.zeros(count, device=place.device),
        (rows, columns),
    )
    left, right = g.t().contiguous(), x.t().contiguous()
    expected = (g.t() @ x).flatten()[flat]
    scale = float(expected.abs().max())
    ways: dict[str, Callable[[], Tensor]] = {
        "sampled_addmm": lambda: torch.sparse.sampled_addmm(
            pattern, left, right.t(), beta=0.0
        ).values(),
        "sampled_addmm with transposes": lambda: torch.sparse.sampled_addmm(
            pattern, g.t().contiguous(), x.t().contiguous().t(), beta=0.0
        ).values(),
        "dense": lambda: g.t() @ x,
        "dense, then chosen": lambda: (g.t() @ x).view(-1)[flat],
    }
    if count * len(x) < 3e8:
        ways["rows chosen, multiplied, summed"] = lambda: (left[row] * right[column]).sum(1)
    found: dict[str, Any] = {"values": count}
    for name, way in ways.items():
        for _ in range(3):
            result = way()
        times = _timed(place, way, 0.15)
        found[name] = {"ms": round(1e3 * statistics.median(times), 4)}
        started = time.perf_counter()
        for _ in range(20):
            way()
        place.synchronise()
        found[name]["in_a_row_ms"] = round(50 * (time.perf_counter() - started), 4)
        if name != "dense":
            found[name]["error"] = float(f"{float((result - expected).abs().max()) / scale:.1e}")
    return found


def rotation_there(place: Place) -> None:
    """Compare the codec's rotation by torch and by numpy: bits, and milliseconds a vector."""
    for rows, count in ((3, 1000),) if place.tiny else ((1, 90_000), (128, 90_000), (1, 8_000_000)):
        with noted(place, f"{rows} x {count} values"):
            values = np.random.default_rng(0).standard_normal((rows, count)).astype(np.float32)
            there = torch.from_numpy(values).to(place.device)
            rotate = functools.partial(
                rotate_updates, coding=VectorCodec.of([(0, count)], codec="dither-3")
            )
            expected, started = values.copy(), time.perf_counter()
            for row in expected:
                Rotation((count,), 5).forward(row)
            numpy = time.perf_counter() - started
            found = there.clone()
            assert rotate(found, rotation_seed=5)
            seeds = itertools.count(6)
            ways: dict[str, Callable[[], Any]] = {
                "there_ms": functools.partial(rotate, there, rotation_seed=5),
                "drawn, there_ms": functools.partial(_rotate_anew, rotate, there, seeds),
                "fetched_ms": there.cpu,
            }
            each = {name: statistics.median(_timed(place, way, 0.5)) for name, way in ways.items()}
            place.found(
                f"{rows} x {count} values",
                {
                    "the same bits": bool(np.array_equal(found.cpu().numpy(), expected)),
                    "numpy_ms": round(1e3 * numpy / rows, 3),
                    **{name: round(1e3 * taken / rows, 4) for name, taken in each.items()},
                },
            )


def _rotate_anew(rotate: Callable[..., bool], there: Tensor, seeds: Iterator[int]) -> bool:
    return rotate(there, rotation_seed=next(seeds))
