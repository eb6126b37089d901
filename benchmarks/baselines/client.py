"""Train a baseline's client: tensors of an ordinary ArrayRecord in, the same trained out."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import Error, Message, MetricRecord, RecordDict
from torch import Tensor

from benchmarks.baselines.methods import Baseline
from fedpet.backbone.pretrained import locate
from fedpet.client.node_config import cache_folder
from fedpet.config import Experiment
from fedpet.data import FederatedData, load_data
from fedpet.errors import FedpetError, TrainingError
from fedpet.training.loop import train_rows
from fedpet.training.optimizer import round_factor
from fedpet.utils.seeds import client_id64, derive_seed

CLIENT_FAILED = 1000  # Flower's error codes below are its own


@dataclass(frozen=True)
class _Resident:
    """Hold model and rows in a process between messages."""

    baseline: Baseline
    data: FederatedData
    rows_of: Mapping[str, np.ndarray]  # client -> its rows


@functools.lru_cache(maxsize=1)
def _resident(method: str, experiment: Experiment) -> _Resident:
    data = load_data(
        experiment.data,
        experiment.clients,
        locate(experiment.backbone),
        cache=cache_folder(experiment),
        evaluation=False,
    )
    rows_of = {client.id: client.rows for client in data.clients}
    return _Resident(Baseline(method, experiment, data), data, rows_of)


def reply(message: Message, method: str, experiment: Experiment) -> Message:
    """Train the client that a message names, from the tensors it brings."""
    client = str(message.content.config_records["config"]["client"])
    try:
        return Message(_train(message.content, client, method, experiment), reply_to=message)
    except FedpetError as error:
        return Message(Error(CLIENT_FAILED, str(error)), reply_to=message)


def _train(content: RecordDict, client: str, method: str, experiment: Experiment) -> RecordDict:
    resident = _resident(method, experiment)
    baseline, training = resident.baseline, experiment.training
    server_round = int(content.config_records["config"]["server-round"])  # type: ignore[arg-type]
    torch.set_num_threads(training.threads)
    baseline.load(content.array_records["arrays"])
    trained = train_rows(
        baseline.model,
        {kind: list(group.values()) for kind, group in baseline.groups.items()},
        resident.data.train,
        resident.rows_of[client],
        resident.data.task,
        training,
        seed=derive_seed("client", experiment.run.seed, server_round, client_id64(client)),
        factor=round_factor(training, server_round, experiment.strategy.num_rounds),
    )
    if not all(_finite(tensor) for tensor in baseline.tensors.values()):
        raise TrainingError(
            "the trained values hold NaN or infinity: lower training.learning-rate."
        )
    metrics = MetricRecord(
        {
            "num-examples": trained.num_examples,
            "train-loss": trained.loss,
            "train-seconds": trained.train_seconds,
        }
    )
    return RecordDict({"arrays": baseline.arrays(), "metrics": metrics})


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
