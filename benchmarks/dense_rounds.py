"""Run FedAvg of a whole model without its messages: the averages stay on the model's device.

A round of ten clients of a model of 135 M values is 11 GB of messages; to write, check and add them
costs a minute of a core, and more than the training where a GPU does that. Their bytes need no
measurement: dense float32 arrays, four bytes a value, both ways. They are reckoned here, and a
result says so. Clients, rows, seeds, optimiser and mean are those of `one_process`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.baselines.one_vector import BaselineVector
from fedpet.config import Experiment
from fedpet.data import FederatedData
from fedpet.errors import TrainingError
from fedpet.protocol.ledger import Ledger
from fedpet.protocol.plan import Plan
from fedpet.server.client_pool import ClientPool
from fedpet.training.loop import train_rows
from fedpet.utils.seeds import client_id64, derive_seed

__all__ = ["MOST_SENT", "run_dense", "stays_here"]

MOST_SENT = 50_000_000  # values, beyond which messages are reckoned


def stays_here(experiment: Experiment, model: BaselineVector) -> bool:
    """Tell whether a model's rounds are run without messages: plain means of whole arrays."""
    strategy, codec = experiment.strategy, experiment.codec
    return (
        model.num_values > MOST_SENT
        and strategy.name == "fedavg"
        and codec.uplink == codec.downlink == "float32"
    )


@torch.no_grad()
def run_dense(
    experiment: Experiment,
    plan: Plan,
    model: BaselineVector,
    data: FederatedData,
    population: ClientPool,
    ledger: Ledger,
    evaluate: Callable[[], float],
) -> np.ndarray:
    """Run all rounds; return the final changes, float32, (num_values,).

    Args:
        evaluate: Returns the metric of the model as it stands.

    Raises:
        TrainingError: A client's training diverged.
    """
    strategy = experiment.strategy
    rows_of = {client.id: client.rows for client in data.clients}
    values = [tensor.detach().clone() for tensor in model.tensors]
    ledger.begin(0).metric = evaluate()
    ledger.close()
    for server_round in range(1, strategy.num_rounds + 1):
        record = ledger.begin(server_round)
        names = population.sample(server_round, strategy.clients_per_round, plan.seed)
        sums = [torch.zeros_like(value, dtype=torch.float64) for value in values]
        weight = loss = 0.0
        for name in names:
            _put(values, model.tensors)
            with torch.enable_grad():
                done = train_rows(
                    model.model, model.parameter_groups(), data.train, rows_of[name], plan.task,
                    plan.training,
                    seed=derive_seed("client", plan.seed, server_round, client_id64(name)),
                    factor=plan.rate_factor(server_round), sent=model.sent_values(),
                )  # fmt: skip
            for total, tensor in zip(sums, model.tensors, strict=True):
                total.add_(tensor, alpha=done.num_examples)
            weight += done.num_examples
            loss += done.num_examples * done.loss
        values = [(total / weight).to(torch.float32) for total in sums]
        if not all(bool(value.isfinite().all()) for value in values):
            raise TrainingError("the trained values are not finite: lower training.learning-rate.")
        _put(values, model.tensors)
        record.clients = record.replies = record.messages = len(names)
        record.aggregated, record.loss = True, loss / weight
        record.uplink_bytes = record.downlink_bytes = 4 * model.num_values * len(names)
        record.wire_bytes = 2 * record.uplink_bytes
        if server_round % strategy.evaluate_every == 0 or server_round == strategy.num_rounds:
            record.metric = evaluate()
        ledger.close()
    return model.get_delta().numpy()


def _put(values: list[Tensor], tensors: list[torch.nn.Parameter]) -> None:
    for value, tensor in zip(values, tensors, strict=True):
        tensor.copy_(value)
