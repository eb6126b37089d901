"""Measure which product of matrices is the fastest here, and remember it for this machine.

In:  a model, the tokens of a pass, and the folder of the cache.
Out: "torch", or another name of `PRODUCTS` that takes at most nine tenths of the time.

Which is faster depends on the processor, on torch's build, on the number of threads and on the
shapes: on one AMD EPYC (family 26) oneDNN needs half the time of torch's MKL, on an older one
(family 25) nearly the same. So it is measured, once for each of these, and stored. A near tie goes
to torch, lest noise decide the last bits of a result.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedpet.backbone.device import device_of
from fedpet.backbone.module_roles import is_dense
from fedpet.config import TrainingConfig
from fedpet.pet.kernels.matmul import PRODUCTS, Product
from fedpet.utils.atomic_write import atomic_write
from fedpet.utils.processor import processor_type

__all__ = ["fastest_product", "settle_product"]

_WORTH = 0.9  # of torch's time: the most that another product may take to be chosen
_ROUNDS, _SECONDS = 9, 0.4  # of a shape, at most


def settle_product(
    training: TrainingConfig, model: nn.Module, cache: Path | None
) -> TrainingConfig:
    """Name the product of local training where its settings leave it to a measurement ("auto")."""
    if training.matmul_backend != "auto":
        return training
    found = fastest_product(model, cache, tokens=256, backward=True, threads=training.threads)
    return replace(training, matmul_backend=found)


def fastest_product(
    model: nn.Module, cache: Path | None, *, tokens: int, backward: bool, threads: int = 0
) -> str:
    """Return the name of the product to take for this model's dense layers.

    Args:
        model: Its weights' shapes, type and device decide.
        cache: The answer is stored below it, where it can be written; None measures each time.
        tokens: Of a pass.
        backward: The input's gradient counts too.
        threads: Of torch, while it is measured; 0 leaves them as they are.
    """
    shapes = Counter(_shape(module) for module in model.modules() if is_dense(module))
    weights = [m.weight for m in model.modules() if is_dense(m)]
    if (
        device_of(model).type != "cpu"
        or any(weight.dtype != torch.float32 for weight in weights)
        or not torch.backends.mkldnn.is_available()
    ):
        return "torch"
    before = torch.get_num_threads()
    key = {
        "processor": [processor_type(), platform.machine()],
        "torch": torch.__version__,
        "threads": threads or before,
        "tokens": tokens,
        "backward": backward,
        "shapes": sorted([*shape, count] for shape, count in shapes.items()),
        "products": sorted(PRODUCTS),
    }
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    file = None if cache is None else cache / "matmul" / f"{name}.json"
    known = None if file is None else _read(file)
    if known is None:
        torch.set_num_threads(threads or before)
        try:
            known = _measure(shapes, tokens, backward)
        finally:
            torch.set_num_threads(before)
        if file is not None:
            _store(file, {**key, "seconds": known})
    best = min(known, key=lambda product: known[product])
    return best if known[best] <= _WORTH * known["torch"] else "torch"


def _shape(module: Any) -> tuple[int, int]:
    rows, columns = module.weight.shape
    return (rows, columns) if isinstance(module, nn.Linear) else (columns, rows)


def _read(file: Path) -> dict[str, float] | None:
    try:
        seconds = json.loads(file.read_text(encoding="utf-8"))["seconds"]
        return {name: float(seconds[name]) for name in PRODUCTS}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _store(file: Path, content: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # a cache that is only read
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, json.dumps(content, indent=1).encode(), shared=True)


@torch.no_grad()
def _measure(shapes: Counter[tuple[int, int]], tokens: int, backward: bool) -> dict[str, float]:
    """Time the products of a pass, in seconds: the least of some rounds, which take turns."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    total = dict.fromkeys(PRODUCTS, 0.0)
    generator = torch.Generator().manual_seed(0)
    for (out, into), count in shapes.items():
        weight = torch.randn(out, into, generator=generator)
        x = torch.randn(tokens, into, generator=generator)
        g = torch.randn(tokens, out, generator=generator) if backward else None
        least = dict.fromkeys(PRODUCTS, float("inf"))
        started = time.perf_counter()
        for turn in range(_ROUNDS):
            for name, product in PRODUCTS.items():
                least[name] = min(least[name], _time(clock, product, x, weight, g))
            if turn and time.perf_counter() - started > _SECONDS:
                break
        for name in PRODUCTS:
            total[name] += count * least[name]
    return total


def _time(
    clock: Callable[[], float], product: Product, x: Tensor, weight: Tensor, g: Tensor | None
) -> float:
    started = clock()
    product(x, weight, None)
    if g is not None:
        product(g, weight.t(), None)
    return clock() - started
