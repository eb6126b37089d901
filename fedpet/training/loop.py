"""Train a model on one client's rows, in plain torch.

In:  a model whose few trainable tensors are known, tokenised rows, and a seed.
Out: the model moved by some steps of an optimiser, and how that went.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from fedpet.backbone.device import device_of
from fedpet.config import TrainingConfig
from fedpet.errors import TrainingError
from fedpet.tasks import kind_of
from fedpet.training.batching import client_batches, inputs_of
from fedpet.training.block_checkpointing import checkpoint_blocks
from fedpet.training.lean_passes import lean_passes
from fedpet.training.loss import client_loss, proximal_gradient
from fedpet.training.optimizer import make_optimizer
from fedpet.utils.seeds import derive_seed

if TYPE_CHECKING:
    from fedpet.data import FederatedData, Rows, Task

__all__ = [
    "SentValues",
    "TrainResult",
    "count_examples",
    "no_number",
    "num_examples",
    "train_rows",
    "training_passes",
]

# Leaves whose numbers are sent as they are, and functions that give the values that are not.
SentValues = tuple[Sequence[Tensor], Sequence[Callable[[], Tensor]]]


@dataclass(frozen=True)
class TrainResult:
    """The outcome of a client's training.

    Attributes:
        num_examples: Rows of the client, or label tokens of a language model: the weight of its
            update in the average.
        loss: Mean training loss over the examples seen. 0 where nothing was trained.
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
    factor: float = 1.0,
    after_step: Callable[[], None] | None = None,
    sent: SentValues | None = None,
) -> TrainResult:
    """Run `config.local_epochs` epochs over one client's rows.

    Args:
        model: Called with a batch; gives an object with `logits`, (rows, outputs).
        groups: What to train, by kind of module; each kind has its own learning rate.
        rows: All tokenised rows here.
        indices: The client's rows among them, (n,).
        task: Cross-entropy over classes, or squared error, where `config.loss` names no other.
        config: Optimiser, loss, batch size, epochs.
        seed: Of the order of the rows, and of dropout.
        factor: Of all learning rates, by the schedule: `round_factor`.
        after_step: Called after each optimiser step, under `no_grad`.
        sent: For FedProx's term, see `PetModel.sent_values`. None takes the tensors in `groups` for
            what is sent.

    The loss that is reported is the data's: the proximal term is in the gradient alone, and joins
    it before it is clipped.

    Raises:
        TrainingError: The loss is not a number, or there are no rows.
        ConfigError: There is no loss of this name.
    """
    if not len(indices):
        raise TrainingError("there are no rows to train on.")
    started = time.perf_counter()
    parameters = [
        tensor
        for group in groups.values()
        for tensor in (group if isinstance(group, list) else [group])
    ]
    optimizer = make_optimizer(
        groups,
        lambda kind: config.rate_of(kind) * factor,
        name=config.optimizer,
        weight_decay=config.weight_decay,
    )
    add_proximal = None
    if config.proximal_mu:
        add_proximal = proximal_gradient(config.proximal_mu, *(sent or (parameters,)))
    if config.dropout:
        torch.manual_seed(derive_seed("dropout", seed))
    device = device_of(model)
    loss_of = client_loss(rows.labels[indices], task, config.logit_adjustment, device, config.loss)
    kind = kind_of(task)
    total_loss, counted, seen = 0.0, 0, 0
    with training_passes(model, rows, config):
        for chosen in client_batches(indices, rows.lengths, config, seed):
            inputs, labels = inputs_of(rows, chosen, device)
            loss = loss_of(model, inputs, labels)
            optimizer.zero_grad(set_to_none=False)
            loss.backward()
            if add_proximal is not None:
                add_proximal()
            if config.clip_norm:
                nn.utils.clip_grad_norm_(parameters, config.clip_norm)
            optimizer.step()
            if after_step is not None:
                after_step()
            weight = kind.weight(rows, chosen)
            total_loss += float(loss.detach()) * weight
            counted, seen = counted + weight, seen + len(chosen)
            if not math.isfinite(total_loss):
                raise no_number(float(loss.detach()), seen)
    seconds = time.perf_counter() - started
    return TrainResult(num_examples(task, rows, indices), total_loss / max(counted, 1), seconds)


def num_examples(task: Task, rows: Rows, indices: np.ndarray) -> int:
    """Count the examples of a client: what its loss is a mean over, or rows where those count."""
    return len(indices) if task.weights == "rows" else kind_of(task).weight(rows, indices)


def count_examples(data: FederatedData, task: Task) -> dict[str, int]:
    """Count the examples of each client by its id, see `num_examples`: the most it may weigh."""
    return {
        client.id: num_examples(task, data.train, client.rows)
        + (num_examples(task, data.train, client.held_out) if len(client.held_out) else 0)
        for client in data.clients
    }


@contextmanager
def training_passes(model: nn.Module, rows: Rows, config: TrainingConfig) -> Iterator[None]:
    """Set a model up for training steps within the context; `train_rows` inside finds it so."""
    if model.training != config.dropout:  # walking the tree of modules costs as much as a step
        model.train(config.dropout)
    if config.gradient_checkpointing:
        checkpoint_blocks(model)
    with lean_passes(model, rows, cls_only=config.cls_only, padding_free=config.padding_free):
        yield


def no_number(loss: float, seen: int) -> TrainingError:
    """Return the error of a loss that became NaN or infinite after so many rows."""
    return TrainingError(
        f"the training loss became {loss} after {seen} rows: lower training.learning-rate, or look "
        "at this client's rows."
    )
