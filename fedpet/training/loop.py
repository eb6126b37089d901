"""Local training and evaluation in plain torch. Knows no Flower and no federation.

    ... -> model -> codec -> plan -> [client] -> strategy -> ledger -> report

In:  a model whose few trainable tensors are known, tokenised rows, and a seed.
Out: the model moved by some steps of a torch optimiser, and how that went.

Rows of like length share a batch, since padding is the largest waste at this size: shuffled rows
are sorted by length within blocks of `BLOCK_BATCHES` batches, and the batches shuffled again.

Where clients' labels are skewed, local training first learns each client's label shares, and the
average swings with the round's clients. Logit adjustment takes that out of the loss: the logits
are compared after `tau * log share` of each class is added, so what is left to learn is the text.

FedProx's proximal term, mu / 2 |v - v_global|^2 over the values that are sent, pulls a client's
work towards the point it began at; it joins the gradient before that is clipped.

Source: Menon et al., ICLR 2021, arXiv:2007.07314 (logit-adjusted softmax cross-entropy); Li et
al., MLSys 2020, arXiv:1812.06127 (FedProx). Ours: the shares are the client's own, one row a class
added so that none is zero.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from fedpet.backbone.device import device_of, moved
from fedpet.config import TrainingConfig
from fedpet.errors import TrainingError
from fedpet.training.cls_only import first_token_only
from fedpet.training.metrics import Assessment, assess, metric_value
from fedpet.utils.seeds import derive_seed

if TYPE_CHECKING:
    from fedpet.data import Rows, Task

BLOCK_BATCHES = 4


@dataclass(frozen=True)
class TrainResult:
    """How a client's training went.

    Attributes:
        num_examples: Rows the client holds; the weight of its update in the average.
        loss: Mean training loss over the rows seen. 0 where nothing was trained.
        train_seconds: Wall time of the steps, loading of values and rows included.
    """

    num_examples: int
    loss: float
    train_seconds: float


def train_rows(
    model: nn.Module,
    groups: Mapping[str, nn.Parameter | list[nn.Parameter]],
    rows: Rows,
    indices: np.ndarray,
    task: Task,
    config: TrainingConfig,
    *,
    seed: int,
    progress: float = 0.0,
    after_step: Callable[[], None] | None = None,
    proximal: Callable[[], None] | None = None,
) -> TrainResult:
    """Run `config.local_epochs` epochs over one client's rows.

    Args:
        model: Called with a batch; gives an object with `logits`, (rows, outputs).
        groups: What to train, by kind of module; each kind has its own learning rate.
        rows: All tokenised rows here.
        indices: The client's rows among them, (n,).
        task: Says which loss: cross-entropy over classes, or squared error.
        config: Optimiser, batch size, epochs.
        seed: Of the order of the rows, and of dropout.
        progress: Fraction of the run's rounds that is over, for the learning-rate schedule.
        after_step: Called after each optimiser step, under `no_grad`.
        proximal: Adds the gradient of FedProx's term, where what is sent is not what is trained;
            see `PetModel.proximal`. None takes the tensors in `groups` for what is sent.

    The loss that is reported is the data's: the proximal term is in the gradient alone.

    Raises:
        TrainingError: The loss is not a number, or there are no rows.
    """
    if not len(indices):
        raise TrainingError("there are no rows to train on.")
    started = time.perf_counter()
    decay = {"constant": 1.0, "linear": 1.0 - progress}[config.schedule]
    parameters = [
        tensor
        for group in groups.values()
        for tensor in (group if isinstance(group, list) else [group])
    ]
    optimiser = make_optimizer(groups, config, decay)
    if config.proximal_mu and proximal is None:
        proximal = _proximal(parameters, config.proximal_mu)
    generator = np.random.default_rng(derive_seed("batches", seed))
    if config.dropout:
        torch.manual_seed(derive_seed("dropout", seed))
    device = device_of(model)
    loss_of = local_loss(rows.labels[indices], task, config.logit_adjustment, device)
    if model.training != config.dropout:  # walking the tree of modules costs as much as a step
        model.train(config.dropout)
    total_loss, seen = 0.0, 0
    passes: AbstractContextManager[None] = nullcontext()
    if config.cls_only:
        passes = first_token_only(model, inputs_of(rows, indices[:1], device)[0])
    with passes:
        for chosen in _epochs(indices, rows.lengths, config, generator):
            inputs, labels = inputs_of(rows, chosen, device)
            loss = loss_of(model(**inputs).logits, labels)
            optimiser.zero_grad(set_to_none=False)
            loss.backward()
            if proximal is not None:
                proximal()
            if config.clip_norm:
                nn.utils.clip_grad_norm_(parameters, config.clip_norm)
            optimiser.step()
            if after_step is not None:
                after_step()
            total_loss += float(loss.detach()) * len(chosen)
            seen += len(chosen)
            if not math.isfinite(total_loss):
                raise TrainingError(
                    f"the training loss became {float(loss.detach())} after {seen} rows: lower "
                    "training.learning-rate, or look at this client's rows."
                )
    return TrainResult(len(indices), total_loss / max(seen, 1), time.perf_counter() - started)


def _epochs(
    indices: np.ndarray, lengths: np.ndarray, config: TrainingConfig, generator: np.random.Generator
) -> Iterator[np.ndarray]:
    for _ in range(config.local_epochs):
        yield from batches(indices, lengths, config.batch_size, generator)


def inputs_of(
    rows: Rows, chosen: np.ndarray, device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    """What a model on this device is called with, and the labels."""
    batch = moved(rows.batch(chosen), device)
    labels = batch.pop("labels")
    return batch, labels


def batches(
    indices: np.ndarray, lengths: np.ndarray, batch_size: int, generator: np.random.Generator
) -> Iterator[np.ndarray]:
    """Cut one epoch into batches of like length, in a seeded order.

    Args:
        indices: Rows to visit once each, (n,).
        lengths: Tokens of every row, indexed by `indices`' entries.
    """
    order = generator.permutation(indices)
    block = BLOCK_BATCHES * batch_size
    cut: list[np.ndarray] = []
    for start in range(0, len(order), block):
        part = order[start : start + block]
        part = part[np.argsort(lengths[part], kind="stable")]
        cut.extend(part[i : i + batch_size] for i in range(0, len(part), batch_size))
    for index in generator.permutation(len(cut)):
        yield cut[index]


def predict(model: nn.Module, rows: Rows, *, batch_size: int = 64) -> np.ndarray:
    """Logits of all rows, in the rows' order. float32, (rows, outputs)."""
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


def evaluate(model: nn.Module, rows: Rows, task: Task) -> float:
    """The task's metric on all rows."""
    return metric_value(task, predict(model, rows), np.asarray(rows.labels))


def assess_rows(model: nn.Module, rows: Rows, task: Task) -> Assessment:
    """The task's metric on all rows, the majority baseline, and what is predicted."""
    return assess(task, predict(model, rows), np.asarray(rows.labels))


def make_optimizer(
    groups: Mapping[str, nn.Parameter | list[nn.Parameter]], config: TrainingConfig, decay: float
) -> torch.optim.Optimizer:
    tables = [
        {
            "params": group if isinstance(group, list) else [group],
            "lr": config.rate_of(kind) * decay,
        }
        for kind, group in groups.items()
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(tables, weight_decay=config.weight_decay, fused=True)
    return torch.optim.AdamW(
        tables, betas=(0.9, 0.999), weight_decay=config.weight_decay, fused=True
    )


def _proximal(parameters: list[nn.Parameter], mu: float) -> Callable[[], None]:
    """Adds the gradient of mu / 2 |p - p now|^2 to the gradient of each tensor."""
    starts = [parameter.detach().clone() for parameter in parameters]

    def add() -> None:
        for parameter, start in zip(parameters, starts, strict=True):
            assert parameter.grad is not None
            parameter.grad.add_(parameter.detach() - start, alpha=mu)

    return add


def local_loss(
    labels: np.ndarray, task: Task, strength: float, device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    """A client's loss, of logits and labels: cross-entropy of adjusted logits.

    Mean squared error where there are no classes.

    Args:
        labels: Of all rows that the client trains on.
        task: Says which loss.
        strength: Of the adjustment; 0 leaves the logits alone.
        device: Of the logits.
    """
    if task.kind == "regression":
        return lambda logits, targets: nn.functional.mse_loss(logits.squeeze(-1), targets)
    counts = np.bincount(labels, minlength=task.num_outputs) + 1.0
    adjustment = (strength * np.log(counts / counts.sum())).astype(np.float32)
    shift = torch.from_numpy(adjustment).to(device)
    return lambda logits, targets: nn.functional.cross_entropy(logits + shift, targets)
