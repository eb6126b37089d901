"""Run a model over the rows of an evaluation, and measure its outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from fedpet.backbone.device import device_of
from fedpet.training.batching import inputs_of
from fedpet.training.metrics import Assessment, assess

if TYPE_CHECKING:
    from fedpet.data import Rows, Task

__all__ = ["assess_rows", "predict"]


def predict(model: nn.Module, rows: Rows, *, batch_size: int = 64) -> np.ndarray:
    """Return the logits of all rows, in the rows' order: float32, (rows, outputs)."""
    if model.training:
        model.eval()
    device = device_of(model)
    order = np.argsort(rows.lengths, kind="stable")
    logits: np.ndarray | None = None
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            out = model(**inputs_of(rows, chosen, device)[0]).logits.float().cpu().numpy()
            if logits is None:
                logits = np.empty((len(order), out.shape[1]), dtype=np.float32)
            logits[chosen] = out
    assert logits is not None, "an evaluation split has rows"
    return logits


def assess_rows(model: nn.Module, rows: Rows, task: Task) -> Assessment:
    """Measure a model on all rows: every metric, the baseline, what is predicted, the clients."""
    return assess(task, predict(model, rows), np.asarray(rows.labels), rows.clients)
