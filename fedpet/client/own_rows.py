"""Measure the metric that decides on the rows that a client does not train on.

A client's rows are measured alone, so that its metric depends on nobody who shares its node; the
model is the node's own, in evaluation mode, and training finds it as it was.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedpet.client.global_values import TierValues
from fedpet.client.model_cache import LoadedPlan
from fedpet.errors import FrameError
from fedpet.protocol.client_metric import ClientMetric
from fedpet.tasks import kind_of
from fedpet.training.evaluation import predict
from fedpet.training.loop import num_examples
from fedpet.training.metrics import METRICS, metric_value

if TYPE_CHECKING:
    from fedpet.data import Task

__all__ = ["measure_after", "measure_before", "measure_values"]


def measure_before(
    loaded: LoadedPlan, start: TierValues, client: int, seed: int
) -> ClientMetric | None:
    """Measure the values that a client received, on the rows that it holds out.

    Args:
        loaded: The plan in force.
        start: The values, of the tier that the model is set to.
        client: Its number.
        seed: Of the client's round, see `PetModel.set_delta`.

    Returns:
        None where the plan asks for nothing, or the client holds nothing out.
    """
    rows = loaded.held_out_of.get(client)
    if not loaded.plan.measures or rows is None or not len(rows):
        return None
    began = time.perf_counter()
    loaded.pet.set_delta(torch.from_numpy(start.values), seed=seed)
    value = _measure(loaded, rows)
    return ClientMetric(_count(loaded, rows), value, seconds=time.perf_counter() - began)


def measure_after(
    loaded: LoadedPlan,
    found: ClientMetric | None,
    client: int,
    trained: np.ndarray | None,
    seed: int,
) -> ClientMetric | None:
    """Add the metric of the client's own trained values, where the plan asks for it.

    Args:
        loaded: The plan in force.
        found: Of `measure_before`.
        client: Its number.
        trained: The values, float32; None where the model stands at them.
        seed: Of the client's round.
    """
    rule = loaded.plan.evaluation
    if found is None or rule is None or rule.values != "both":
        return found
    began = time.perf_counter()
    if trained is not None:
        loaded.pet.set_delta(torch.from_numpy(trained), seed=seed)
    value = _measure(loaded, loaded.held_out_of[client])
    seconds = found.seconds + time.perf_counter() - began
    return replace(found, after=value, seconds=seconds)


def measure_values(loaded: LoadedPlan, start: TierValues, client: int) -> ClientMetric:
    """Measure values that nothing is trained from: of a client that never trains on all its rows.

    Raises:
        FrameError: The client holds nothing out.
    """
    rule = loaded.plan.evaluation
    rows = loaded.held_out_of.get(client, np.empty(0, dtype=np.int64))
    if rule is not None and rule.is_unseen(client):
        rows = np.sort(np.concatenate([loaded.rows_of[client], rows]))
    if not len(rows):
        raise FrameError("this client holds no rows out to measure on.")
    began = time.perf_counter()
    loaded.pet.set_tier(start.tier)
    loaded.pet.set_delta(torch.from_numpy(start.values), seed=loaded.plan.seed)
    value = _measure(loaded, rows)
    return ClientMetric(_count(loaded, rows), value, seconds=time.perf_counter() - began)


def _count(loaded: LoadedPlan, rows: np.ndarray) -> int:
    """Count rows, or what the task's loss is a mean over: tokens with labels."""
    return num_examples(loaded.plan.task, loaded.data.train, rows)


def _measure(loaded: LoadedPlan, indices: np.ndarray) -> float:
    """Return the metric that decides, NaN where outputs are not finite."""
    rows, task = loaded.data.train.take(indices), _own_task(loaded.plan.task)
    logits = predict(loaded.pet.model, rows, task)
    return metric_value(task, logits, np.asarray(rows.labels))


def _own_task(task: Task) -> Task:
    """Return the task with the metric that decides alone: a user's runs where it is registered.

    Raises:
        ConfigError: It is not.
    """
    if task.metric in kind_of(task).metrics:
        return replace(task, metrics=())
    for name in task.metrics:  # which the server sent
        METRICS.find_registered(name)
    return task
