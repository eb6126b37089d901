"""Search a structure, or train one from scratch and evaluate it, on all rows together.

Rows and backbone stay in the process, so that a call costs its own steps only. The backbone is the
checkpoint again after each call.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedpet.backbone.device import device_of
from fedpet.backbone.pretrained import Backbone, load_backbone, locate
from fedpet.config import (
    BackboneConfig,
    ClientsConfig,
    DataConfig,
    SearchConfig,
    TrainingConfig,
)
from fedpet.data import FederatedData, Task, load_data
from fedpet.data import Rows as TokenisedRows
from fedpet.errors import TrainingError
from fedpet.pet.model import PetModel
from fedpet.pet.structure import Structure
from fedpet.run.central_search import find_structure
from fedpet.search import resolve_settings
from fedpet.training.batching import batches, inputs_of
from fedpet.training.evaluation import predict
from fedpet.training.loss import client_loss
from fedpet.training.metrics import metric_value
from fedpet.utils.seeds import derive_seed

_EVERYBODY = ClientsConfig(partition="iid", num_clients=1, min_rows=1)


@dataclass(frozen=True)
class Rows:
    """Name a sample of a data set's training split, and the rows to evaluate on."""

    dataset: str
    metric: str
    text_columns: tuple[str, ...]
    max_length: int
    train_rows: int
    held_rows: int  # the next ones of the sample, for tuning
    eval_splits: tuple[str, ...]  # () evaluates on the held rows
    logit_adjustment: float = 0.0


def run_centrally(
    backbone_config: BackboneConfig,
    rows: Rows,
    search: SearchConfig,
    training: TrainingConfig | None,
    seed: int,
    *,
    found_by: Path | None,
    folder: Path,
    cache: Path,
) -> dict[str, Any]:
    """Search a structure, and train it where `training` is given.

    Args:
        backbone_config: The checkpoint.
        rows: Trained and evaluated on.
        search: How the structure is found.
        training: How it is trained; None returns the structure.
        seed: Of the training.
        found_by: File of an earlier call's structure, to train that one.
        folder: Of the data sets; only read.
        cache: For tokenised rows.

    Returns:
        Numbers and names that JSON holds.
    """
    torch.set_num_threads(1)
    started = time.perf_counter()
    splits = rows.eval_splits or ("train",)
    parts = [load_rows(rows, split, folder, backbone_config, cache) for split in splits]
    data = parts[0]
    backbone = _backbone(backbone_config, data.task.num_outputs, data.task.kind == "regression")
    train, held = sample(rows, len(data.train))
    if found_by is not None:
        found = json.loads(found_by.read_text(encoding="utf-8"))["result"]
        structure = Structure.from_json(json.dumps(found["structure"]))
        structure.check_backbone(backbone.fingerprint)
    else:
        names = set(backbone.head)
        parameters = backbone.model.named_parameters()
        count = sum(p.numel() for name, p in parameters if name not in names)
        config = resolve_settings(search, training or TrainingConfig(), backbone_parameters=count)
        structure = find_structure(
            backbone, data, config, logit_adjustment=rows.logit_adjustment, indices=train
        )
    seconds = {"search_seconds": round(time.perf_counter() - started, 2)}
    if training is None:
        text = structure.to_json()
        return {
            "structure": json.loads(text),
            "values": structure.provenance["values"],
            "score": structure.provenance["checkpoint"][rows.metric],
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            **seconds,
        }
    started = time.perf_counter()
    pet = PetModel(backbone, None, structure, seed=seed)
    try:
        training = replace(training, logit_adjustment=rows.logit_adjustment)
        loss = train_structure(pet, data.train, train, data.task, training, seed=seed)
        values = pet.get_delta().numpy().astype("<f4")
        if rows.eval_splits:
            evaluated = [part.evaluation for part in parts]
        else:
            evaluated = [data.train.take(held)]
        logits = np.concatenate([predict(pet.model, part) for part in evaluated])
        labels = np.concatenate([np.asarray(part.labels) for part in evaluated])
        sizes: dict[str, int] = {}
        for segment in pet.segments:
            sizes[segment.kind] = sizes.get(segment.kind, 0) + segment.size
    finally:
        pet.unload()
    return {
        "score": metric_value(data.task, logits, labels),
        "loss": loss,
        "evaluated_rows": len(labels),
        "structure_values": sum(size for kind, size in sizes.items() if kind != "head"),
        "values_by_kind": sizes,
        "modules": [[spec.kind, spec.target, spec.rank] for spec in structure.modules],
        "sha256": hashlib.sha256(values.tobytes()).hexdigest(),
        "train_seconds": round(time.perf_counter() - started, 2),
    }


def train_structure(
    pet: PetModel,
    rows: TokenisedRows,
    indices: np.ndarray,
    task: Task,
    config: TrainingConfig,
    *,
    seed: int,
) -> float:
    """Train centrally: AdamW, rates falling linearly to 0, `config.local_epochs` epochs.

    Returns:
        The mean loss of the last epoch.

    Raises:
        TrainingError: The loss is not a number.
    """
    groups = pet.parameter_groups()
    tables = [{"params": [g], "lr": config.rate_of(kind)} for kind, g in groups.items()]
    optimiser = torch.optim.AdamW(tables, weight_decay=config.weight_decay, fused=True)
    per_epoch = -(-len(indices) // config.batch_size)
    total = config.local_epochs * per_epoch
    falling = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / total)
    generator = np.random.default_rng(derive_seed("batches", seed))
    torch.manual_seed(derive_seed("dropout", seed))
    pet.model.train(config.dropout)
    device = device_of(pet.model)
    loss_of = client_loss(rows.labels[indices], task, config.logit_adjustment, device)
    losses: list[float] = []
    for _ in range(config.local_epochs):
        losses = []
        for chosen in batches(indices, rows.lengths, config.batch_size, generator):
            batch, labels = inputs_of(rows, chosen, device)
            pet.zero_grad()
            loss = loss_of(pet.model, batch, labels)
            loss.backward()
            if config.clip_norm:
                nn.utils.clip_grad_norm_(groups.values(), config.clip_norm)
            optimiser.step()
            falling.step()
            pet.after_step()
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise TrainingError(f"the loss became {losses[-1]}: lower the learning rate.")
    pet.model.eval()
    return sum(losses) / len(losses)


def sample(rows: Rows, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return indices of the rows to train on and of those held out, the same for every seed."""
    order = np.random.default_rng(derive_seed("search table", rows.dataset)).permutation(count)
    return order[: rows.train_rows], order[rows.train_rows : rows.train_rows + rows.held_rows]


@functools.cache
def load_rows(
    rows: Rows, split: str, folder: Path, backbone: BackboneConfig, cache: Path
) -> FederatedData:
    """Read the training split and one to evaluate on."""
    config = DataConfig(
        source=str(folder / rows.dataset),
        eval_split=split,
        text_columns=rows.text_columns,
        metric=rows.metric,
        task="regression" if rows.metric == "pearson" else "classification",
        max_length=rows.max_length,
    )
    return load_data(config, _EVERYBODY, locate(backbone), cache=cache)


@functools.cache
def _backbone(config: BackboneConfig, num_outputs: int, regression: bool) -> Backbone:
    return load_backbone(config, num_outputs=num_outputs, regression=regression)
