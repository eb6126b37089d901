"""Measure how far frozen features go: logistic regression on all rows at once, nothing federated.

In:  the rows of an experiment, the checkpoint as it is.
Out: the metric of the better of two features, the first token's last state and the mean of all
     tokens'. It says how hard a task is: what fine-tuning does not add to it, it did not learn.

The strength of the L2 term and the feature are chosen on a fifth of the training rows; the fit on
all of them is reported.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from fedpet.backbone.pretrained import load_for_task, locate
from fedpet.client.node_config import make_cache
from fedpet.config import Experiment
from fedpet.data import FederatedData, load_data
from fedpet.data.rows import Rows
from fedpet.errors import ConfigError
from fedpet.training.batching import inputs_of
from fedpet.training.input_checks import settle_padding
from fedpet.training.metrics import assess, greater_is_better
from fedpet.utils.seeds import derive_seed

__all__ = ["PROBE", "fit_logistic", "run_probe"]

PROBE = "probe"
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0)  # of L2, beside the mean loss
HELD_OUT = 0.2
TOKENS = 1024  # a batch
_STEPS = 200  # of L-BFGS at most

Linear = tuple[np.ndarray, np.ndarray]  # weight (classes, features), bias (classes,)


def run_probe(experiment: Experiment) -> dict[str, Any]:
    """Fit both features, and return a result as a run's, as far as it has the same fields.

    Raises:
        ConfigError: The task is no classification.
        InputError: The checkpoint or the data cannot be used.
    """
    clock = time.process_time()
    if experiment.data.task != "classification":
        raise ConfigError("the probe is a logistic regression: data.task must be classification.")
    torch.set_num_threads(experiment.training.threads)
    data = load_data(
        experiment.data,
        experiment.clients,
        locate(experiment.backbone),
        cache=make_cache(experiment),
    )
    backbone = load_for_task(experiment.backbone, data.task, device="cpu")
    settle_padding(backbone.model, data.train)
    trained = np.concatenate([client.rows for client in data.clients])
    inner = backbone.model.base_model
    of_train = _features(inner, data.train, trained)
    of_evaluation = _features(inner, data.evaluation, np.arange(len(data.evaluation)))
    seed = derive_seed("probe", experiment.run.seed)
    found = {
        name: _chosen(data, of_train[name], data.train.labels[trained], of_evaluation[name], seed)
        for name in of_train
    }
    sign = 1 if greater_is_better(data.task.metric) else -1
    best = max(found, key=lambda name: sign * found[name]["held_out"])
    final = found[best]["assessment"]
    return {
        "run": {"method": PROBE, "seed": experiment.run.seed, "status": "ok"},
        "quality": {
            "metric": data.task.metric,
            "final": final.value,
            "majority_baseline": final.majority_baseline,
            "feature": best,
            "by_feature": {name: one["assessment"].value for name, one in found.items()},
            "strength": found[best]["strength"],
            "at_edge": found[best]["strength"] in (STRENGTHS[0], STRENGTHS[-1]),
        },
        "data": {"train_rows": len(trained), "evaluation_rows": len(data.evaluation)},
        "time": {"processor_seconds": time.process_time() - clock},
        "final_values_sha256": found[best]["sha256"],
    }


@torch.inference_mode()
def _features(model: nn.Module, rows: Rows, chosen: np.ndarray) -> dict[str, np.ndarray]:
    """Compute the states of the last block: float32, (rows, width), by name of the feature."""
    model.eval()
    order = chosen[np.argsort(rows.lengths[chosen], kind="stable")]
    place = np.argsort(np.argsort(rows.lengths[chosen], kind="stable"), kind="stable")
    parts: dict[str, list[np.ndarray]] = {"first token": [], "mean of tokens": []}
    for batch in _batches(order, rows.lengths):
        inputs, _ = inputs_of(rows, batch, torch.device("cpu"))
        states = model(**inputs).last_hidden_state  # (rows, tokens, width)
        here = inputs["attention_mask"][..., None].to(states.dtype)
        parts["first token"].append(states[:, 0].numpy())
        parts["mean of tokens"].append(((states * here).sum(1) / here.sum(1)).numpy())
    return {name: np.concatenate(pieces)[place] for name, pieces in parts.items()}


def _batches(order: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
    start = 0
    while start < len(order):
        size = max(TOKENS // int(lengths[order[start]]), 1)
        yield order[start : start + size]
        start += size


def _chosen(
    data: FederatedData, train: np.ndarray, labels: np.ndarray, evaluation: np.ndarray, seed: int
) -> dict[str, Any]:
    """Choose the strength on held-out rows, fit on all of them, measure on the evaluation rows."""
    centre, scale = train.mean(0), train.std(0) + 1e-6
    train, evaluation = (train - centre) / scale, (evaluation - centre) / scale
    held = np.random.default_rng(seed).permutation(len(train)) < HELD_OUT * len(train)
    classes = len(data.task.label_names)
    sign = 1 if greater_is_better(data.task.metric) else -1
    scores = {}
    for strength in STRENGTHS:
        weight, bias = fit_logistic(train[~held], labels[~held], classes, strength)
        scores[strength] = assess(data.task, train[held] @ weight.T + bias, labels[held]).value
    strength = max(scores, key=lambda one: (sign * scores[one], one))
    weight, bias = fit_logistic(train, labels, classes, strength)
    assessment = assess(data.task, evaluation @ weight.T + bias, np.asarray(data.evaluation.labels))
    return {
        "held_out": scores[strength],
        "strength": strength,
        "assessment": assessment,
        "sha256": hashlib.sha256(weight.astype("<f4").tobytes()).hexdigest(),
    }


def fit_logistic(features: np.ndarray, labels: np.ndarray, classes: int, strength: float) -> Linear:
    """Fit a linear classifier by L-BFGS: mean cross-entropy of a row + strength / 2 * |weight|^2.

    Args:
        features: float32, (rows, width).
        labels: Class numbers, (rows,); every class below `classes` has an output.
        classes: Outputs.
        strength: Of the L2 term, above 0; the bias is free.
    """
    x, y = torch.from_numpy(features.astype(np.float32)), torch.as_tensor(labels).long()
    weight = torch.zeros(classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=_STEPS, history_size=10, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(x @ weight.T + bias, y)
        loss = loss + strength / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach().numpy(), bias.detach().numpy()
