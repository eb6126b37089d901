"""Train many clients at once, each on its own rows: the loop of `train_rows`, taken side by side.

In:  a model with its trainables, clients with their rows and seeds, all at one point.
Out: each client's result and values, as if it had been trained alone, up to rounding.

On a GPU a step of a small model takes as long as its launches from Python, whatever the number of
rows. The frozen weights are the same for all clients, so their steps go together: batch t of every
client is one batch of the model, and one step of the optimiser moves all. A client takes the
batches, losses, learning rates and clipped gradients that it would take alone. One that has taken
all its steps leaves, and the others go on.

Source: ours; a stack of parameters as in `torch.func`'s ensembles of models.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from fedpet.backbone.device import device_of
from fedpet.errors import TrainingError
from fedpet.pet.client_stack import ClientStack
from fedpet.pet.layers.client_forward import NotStackableError
from fedpet.tasks import kind_of
from fedpet.tasks.classification import logit_shift
from fedpet.training.batching import client_batches, inputs_of
from fedpet.training.cls_only import check_first_token, first_token_only
from fedpet.training.loop import TrainResult, no_number, num_examples
from fedpet.training.optimizer import make_optimizer

if TYPE_CHECKING:
    from fedpet.config import TrainingConfig
    from fedpet.data import Rows, Task
    from fedpet.pet.model import PetModel

__all__ = ["ClientWork", "TrainedClient", "train_at_once"]


@dataclass(frozen=True)
class ClientWork:
    """A client's share of a round: its rows, and the seed of their order and of what is drawn."""

    indices: np.ndarray  # (n,)
    seed: int


@dataclass(frozen=True)
class TrainedClient:
    """The outcome of a client's training.

    Attributes:
        update: The values less those of the start, float32, (num_values,).
        result: How it went.
        rotated: The update is rotated already, see fedpet/codec/torch_rotation.py.
    """

    update: np.ndarray
    result: TrainResult
    rotated: bool = False


def train_at_once(
    pet: PetModel,
    start: np.ndarray,
    clients: Sequence[ClientWork],
    rows: Rows,
    task: Task,
    config: TrainingConfig,
    *,
    factor: float = 1.0,
    rotate: Callable[[Tensor], bool] | None = None,
) -> list[TrainedClient | TrainingError]:
    """Train clients from one point.

    Args:
        pet: In the tier of all of them. It stands elsewhere afterwards.
        start: The point, float32, (num_values,).
        clients: At least one, each with rows.
        rows: All tokenised rows here.
        task: Of the rows.
        config: As for `train_rows`.
        factor: As for `train_rows`.
        rotate: Rotates all updates, (clients, num_values), in place on a GPU, and tells whether it
            did.

    Returns:
        For each client its update and result, or the error that it would have met alone: a loss
        that is no number touches no other client.

    Raises:
        NotStackableError: These clients must be trained one by one; it says why.
    """
    _check_settings(pet, config, rows, task)
    _check_model(pet, start, clients[0], rows)
    began = time.perf_counter()
    lengths = rows.lengths
    batches = [list(client_batches(c.indices, lengths, config, c.seed)) for c in clients]
    order = sorted(range(len(clients)), key=lambda index: -len(batches[index]))
    run = _Run(
        ClientStack(pet, start, [clients[index].seed for index in order]),
        [batches[index] for index in order],
        [rows.labels[clients[index].indices] for index in order],
        rows,
        task,
        config,
        factor,
    )
    with _passes(pet, run.stack, rows, config):
        run.train()
    updates = run.stack.deltas()
    updates -= torch.from_numpy(start).to(updates)
    rotated = bool(rotate and updates.device.type != "cpu" and rotate(updates))
    spent = (time.perf_counter() - began) / max(sum(map(len, batches)), 1)
    outcomes: dict[int, TrainedClient | TrainingError] = {}
    for index, own, outcome in zip(order, updates.cpu().numpy(), run.outcomes(), strict=True):
        if isinstance(outcome, TrainingError):
            outcomes[index] = outcome
            continue
        seconds = spent * len(batches[index])
        result = TrainResult(num_examples(task, rows, clients[index].indices), outcome, seconds)
        outcomes[index] = TrainedClient(own, result, rotated)
    return [outcomes[index] for index in range(len(clients))]


class _Run:
    """The steps of all clients; those with the most steps come first."""

    def __init__(
        self,
        stack: ClientStack,
        batches: list[list[np.ndarray]],
        labels: list[np.ndarray],
        rows: Rows,
        task: Task,
        config: TrainingConfig,
        factor: float,
    ) -> None:
        self.stack, self._batches = stack, batches
        self._rows, self._task, self._config = rows, task, config
        group = next(iter(stack.groups.values()))
        self._device = group.device
        self._shift: Tensor | None = None  # (clients, 1, classes)
        if kind_of(task).has_classes:
            shifts = [logit_shift(own, task, config.logit_adjustment) for own in labels]
            self._shift = torch.from_numpy(np.stack(shifts))[:, None].to(group.device)
        self._optimizer = make_optimizer(
            stack.groups,
            lambda kind: config.rate_of(kind) * factor,
            name=config.optimizer,
            weight_decay=config.weight_decay,
        )
        self._start = {kind: group.detach()[:1].clone() for kind, group in stack.groups.items()}
        self._losses: list[Tensor] = []  # of each step, (clients,)

    def train(self) -> None:
        """Take all steps."""
        for step in range(len(self._batches[0])):
            active = sum(len(own) > step for own in self._batches)
            if active < self.stack.clients:
                self._keep(active)
            self._step([own[step] for own in self._batches[:active]])

    def _step(self, chosen: Sequence[np.ndarray]) -> None:
        most = max(map(len, chosen))
        counts = torch.tensor([len(own) for own in chosen]).to(self._device)
        # A client with fewer rows shows its first again, and it counts nothing.
        filled = [np.concatenate([own, own[:1].repeat(most - len(own))]) for own in chosen]
        inputs, labels = inputs_of(self._rows, np.concatenate(filled), self._device)
        logits = self.stack(inputs).logits
        if self._shift is not None:
            shift = self._shift[: len(chosen)].expand(-1, most, -1)
            logits = logits + shift.reshape(logits.shape)
        each = kind_of(self._task).row_losses(self._task, logits, labels).view(len(chosen), most)
        inside = torch.arange(most, device=self._device) < counts[:, None]
        losses = torch.where(inside, each, 0).sum(1) / counts  # (clients,)
        for group in self.stack.groups.values():
            group.grad = None
        losses.sum().backward()
        with torch.no_grad():
            self._pull_and_clip()
        self._optimizer.step()
        self._losses.append(losses.detach())

    def _pull_and_clip(self) -> None:
        """Add FedProx's gradient, then clip each client's whole gradient."""
        gradients = []
        for kind, group in self.stack.groups.items():
            assert group.grad is not None
            if self._config.proximal_mu:
                group.grad.add_(group - self._start[kind], alpha=self._config.proximal_mu)
            gradients.append(group.grad)
        if self._config.clip_norm:
            squares = [gradient.square().sum(1) for gradient in gradients]
            norms = torch.stack(squares).sum(0).sqrt()  # (clients,)
            factors = (self._config.clip_norm / (norms + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                gradient.mul_(factors[:, None])

    def _keep(self, active: int) -> None:
        self.stack.keep(active)
        for group in self.stack.groups.values():
            state = self._optimizer.state[group]
            for name, tensor in state.items():
                if isinstance(tensor, Tensor) and tensor.dim():
                    state[name] = tensor[:active]

    def outcomes(self) -> Iterator[float | TrainingError]:
        """Yield each client's mean loss over the rows seen; the error of one that was no number."""
        losses = [step.cpu().tolist() for step in self._losses]
        for client, batches in enumerate(self._batches):
            total, seen, error = 0.0, 0, None
            for step, chosen in zip(losses, batches, strict=False):
                total += step[client] * len(chosen)
                seen += len(chosen)
                if not math.isfinite(total):
                    error = no_number(step[client], seen)
                    break
            yield error or total / max(seen, 1)


@contextmanager
def _passes(
    pet: PetModel, stack: ClientStack, rows: Rows, config: TrainingConfig
) -> Iterator[None]:
    """Let the model compute for the clients; of the last block what is read, where that is asked.

    The model is tried with its own passes, and cut within those of the clients.
    """
    if pet.model.training:
        pet.model.eval()
    cut: AbstractContextManager[None] = nullcontext()
    if config.cls_only:
        one = inputs_of(rows, np.arange(1), device_of(pet.model))[0]
        check_first_token(pet.model, one)
        cut = first_token_only(pet.model, one)
    with stack.installed(), cut:
        yield


def _check_settings(pet: PetModel, config: TrainingConfig, rows: Rows, task: Task) -> None:
    reasons = {
        f"the loss of data.task = {task.kind!r} is of one client's labels": not kind_of(
            task
        ).stacks,
        "training.gradient-checkpointing computes one client's blocks": (
            config.gradient_checkpointing
        ),
        "weights of bfloat16 meet one client's float32 values at a time": (
            next(pet.model.parameters()).dtype == torch.bfloat16
        ),
        "training.dropout draws for one client at a time": config.dropout,
        "training.loss is a function of one client's batch": bool(config.loss),
        "the data collator makes one client's batch": rows.collator is not None,
        "FedProx's term of adapters on biases is one client's": bool(
            config.proximal_mu and pet.sent_values()[1]
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise NotStackableError(reason)


_refused: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # "" of one that qualifies


def _check_model(pet: PetModel, start: np.ndarray, client: ClientWork, rows: Rows) -> None:
    """Try the model on four rows of two clients, once."""
    reason = _refused.get(pet)
    if reason is None:
        four = np.resize(client.indices, 4)
        inputs, _ = inputs_of(rows, four, device_of(pet.model))
        if pet.model.training:
            pet.model.eval()
        try:
            ClientStack(pet, start, [client.seed, client.seed + 1]).check(inputs)
            reason = ""
        except NotStackableError as error:
            reason = str(error)
        except Exception as error:  # whatever a model raises that is not made of rows
            reason = f"its passes do not take many clients ({type(error).__name__})"
        _refused[pet] = reason
    if reason:
        raise NotStackableError(reason)
