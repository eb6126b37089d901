"""Run a model over the rows of an evaluation, and measure its outputs.

Rows are sorted by length and cut into batches that the processor's cache holds: on a CPU by
tokens, where 768 cost a fifth less than 64 rows of any length. There each core computes batches of
its own, since one batch keeps no two cores busy; so outputs do not depend on how many there are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from fedpet.backbone.device import device_of
from fedpet.pet.kernels.matmul import linear_by
from fedpet.pet.kernels.matmul_timing import fastest_product
from fedpet.tasks import kind_of
from fedpet.training.batching import inputs_of
from fedpet.training.lean_passes import lean_passes
from fedpet.training.metrics import Assessment, assess
from fedpet.training.text_metrics import text_metrics, written_metrics

if TYPE_CHECKING:
    from fedpet.data import Rows, Task
    from fedpet.training.generation import Writer

__all__ = ["assess_rows", "predict"]

_MAX_TOKENS = 768  # a batch on a CPU, padding counted
_MAX_ROWS = 64  # a batch on a GPU
_WORTH_MEASURING = 3e11  # operations of one evaluation: seconds of one core


def predict(
    model: nn.Module,
    rows: Rows,
    task: Task | None = None,
    *,
    batch_size: int = 0,
    product: str = "torch",
    dtype: str = "float32",
) -> np.ndarray:
    """Return what the metrics need of all rows, in the rows' order: (rows, numbers).

    For classes and values these are the logits, float32.

    Args:
        model: Put into evaluation mode.
        rows: At least one.
        task: Says which; None takes the logits.
        batch_size: Rows a batch; 0 takes what suits the device.
        product: Of dense layers, see fedpet/pet/kernels/matmul.py.
        dtype: "bfloat16" multiplies matrices in it, rounded to three digits.
    """
    if model.training:
        model.eval()
    device = device_of(model)
    kind = kind_of("classification" if task is None else task)
    making = threading.Lock()  # a user's collator may keep state

    def outputs_of(chosen: np.ndarray) -> np.ndarray:
        half: AbstractContextManager[None] = nullcontext()
        if dtype == "bfloat16":
            half = torch.autocast(device.type, torch.bfloat16)
        with torch.inference_mode(), half, linear_by(product):
            with making:
                inputs, labels = inputs_of(rows, chosen, device)
            out: np.ndarray = kind.outputs(model, inputs, labels).cpu().numpy()
        return out

    batches = list(_by_length(rows.lengths, batch_size, device))
    # A model is tried for lean passes at its own precision.
    with torch.inference_mode(), lean_passes(model, rows):
        found = _each_core_its_own(outputs_of, batches, _cores_for(model, device))
    outputs = np.empty((len(rows), found[0].shape[1]), dtype=found[0].dtype)
    outputs[np.concatenate(batches)] = np.concatenate(found)
    return outputs


def _cores_for(model: nn.Module, device: torch.device) -> int:
    """Return at how many batches to work at once.

    A model of `transformers` keeps nothing between passes; a stranger's may.
    """
    ours = type(model).__module__.startswith("transformers.")
    return torch.get_num_threads() if device.type == "cpu" and ours else 1


def _each_core_its_own(
    compute: Callable[[np.ndarray], np.ndarray], batches: list[np.ndarray], cores: int
) -> list[np.ndarray]:
    """Compute all batches, in their order; the first alone, and with it what is made once."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if cores == 1 else 1)
    try:
        first = compute(batches[0])
        if cores == 1 or len(batches) == 1:
            return [first, *map(compute, batches[1:])]
        longest_first = batches[:0:-1]
        with ThreadPoolExecutor(cores) as pool:
            return [first, *reversed([*pool.map(compute, longest_first)])]
    finally:
        torch.set_num_threads(before)


def assess_rows(
    model: nn.Module,
    rows: Rows,
    task: Task,
    *,
    cache: Path | None = None,
    dtype: str = "float32",
    writer: Writer | None = None,
) -> Assessment:
    """Measure a model on all rows: every metric, the baseline, what is predicted, the clients.

    Args:
        model: Put into evaluation mode.
        rows: At least one.
        task: Names the metrics.
        cache: Where it is stored which product is the fastest; None takes torch's.
        dtype: As of `predict`.
        writer: For metrics of texts that the model writes; None takes none.
    """
    product = "torch" if cache is None else _product_for(model, rows, cache)
    logits = predict(model, rows, task, product=product, dtype=dtype)
    written: dict[str, float] = {}
    names = written_metrics(task)
    if names and writer is not None and np.isfinite(logits).all():
        written = text_metrics(names, writer.write(model, rows, np.arange(len(rows))))
    return assess(task, logits, np.asarray(rows.labels), rows.clients, written)


def _product_for(model: nn.Module, rows: Rows, cache: Path) -> str:
    """Return the fastest product for evaluating these rows; torch's where that takes no second."""
    numbers = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    if 2 * numbers * int(rows.offsets[-1]) < _WORTH_MEASURING:
        return "torch"
    threads = 1 if _cores_for(model, device_of(model)) > 1 else 0
    return fastest_product(model, cache, tokens=_MAX_TOKENS, backward=False, threads=threads)


def _by_length(lengths: np.ndarray, batch_size: int, device: torch.device) -> Iterator[np.ndarray]:
    """Yield all rows once, the shortest first."""
    order = np.argsort(lengths, kind="stable")
    start = 0
    while start < len(order):
        size = batch_size or _MAX_ROWS
        if not batch_size and device.type == "cpu":
            size = max(_MAX_TOKENS // int(lengths[order[start]]), 1)
            size = max(_MAX_TOKENS // int(lengths[order[start : start + size][-1]]), 1)
        yield order[start : start + size]
        start += size
