"""A run from end to end, on any Grid: simulated, deployed, or in one process.

    backbone -> mask -> structure -> model -> codec
             -> plan -> client -> strategy -> ledger -> report

Everything that decides the run is settled before the first message; the rounds are Flower's own
loop; afterwards the values are folded into a plain model, and the books are closed.
"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import Grid

from fedpet.backbone import Backbone, load_backbone, locate
from fedpet.client import cache_folder
from fedpet.codec import check_codec
from fedpet.config import Experiment
from fedpet.data import FederatedData, load_data
from fedpet.errors import RunError, StructureError
from fedpet.ledger import Ledger, RoundRecord
from fedpet.model import PetModel
from fedpet.plan import Plan, groups_by_kind, make_plan
from fedpet.population import Population
from fedpet.positions import find_positions
from fedpet.strategies import STRATEGIES, to_arrays, values_of
from fedpet.structure import Structure, preset
from fedpet.training import evaluate

from .run_folder import RunFolder
from .summary import count_by_kind, summarise

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Listener(Protocol):
    """Whoever wants to see a run go on."""

    def say(self, text: str) -> None:
        """A stage begins."""

    def round_done(self, record: RoundRecord, ledger: Ledger) -> None:
        """A round, or the evaluation before the first, is over."""


@dataclass(frozen=True)
class Prepared:
    """What is settled before the first message: rows, clients, the plan, the server's model."""

    experiment: Experiment
    data: FederatedData
    plan: Plan
    pet: PetModel
    all_parameters: int  # of the backbone and its head
    pretrained_parameters: int
    started: float  # on `time.perf_counter`'s clock


def prepare(experiment: Experiment, listener: Listener) -> Prepared:
    """Read the rows, load the backbone, find the structure, settle the plan.

    Raises:
        InputError: The experiment, the checkpoint or the data cannot be used.
    """
    started = time.perf_counter()
    check_codec(experiment.codec.up)
    check_codec(experiment.codec.down)
    listener.say("reading and tokenising the rows")
    data = load_data(
        experiment.data,
        experiment.population,
        locate(experiment.backbone),
        cache=cache_folder(experiment),
    )
    listener.say(f"loading the backbone {experiment.backbone.model!r}, settling the plan")
    backbone = load_backbone(
        experiment.backbone,
        num_outputs=data.task.num_outputs,
        regression=data.task.kind == "regression",
    )
    pretrained_parameters = sum(
        parameter.numel()
        for name, parameter in backbone.model.named_parameters()
        if name not in backbone.head
    )
    all_parameters = _num_parameters(backbone.model)
    structure = _structure(experiment, backbone)
    plan, pet = make_plan(experiment, backbone, structure, data.task, data.tokenizer_hash)
    return Prepared(experiment, data, plan, pet, all_parameters, pretrained_parameters, started)


def federate(grid: Grid, prepared: Prepared, out: RunFolder, listener: Listener) -> dict[str, Any]:
    """Run the rounds and leave the run folder.

    Args:
        grid: Reaches the nodes.
        prepared: What to run; its model is used up.
        out: Where everything goes that the run leaves.
        listener: Is told of stages and rounds.

    Returns:
        What `result.json` holds.

    Raises:
        RunError: No round came to an average.
    """
    experiment, data = prepared.experiment, prepared.data
    plan, pet = prepared.plan, prepared.pet
    torch.set_num_threads(os.cpu_count() or 1)  # the server evaluates while the nodes are idle
    out.write_inputs(experiment, plan)
    ledger = Ledger(out.path / "rounds.jsonl")
    strategy = STRATEGIES[experiment.strategy.name](
        plan=plan,
        groups=groups_by_kind(pet.segments),
        population=Population({c.id: len(c.rows) for c in data.clients}, homes={}),
        config=experiment.strategy,
        ledger=ledger,
    )
    last_round = experiment.strategy.num_rounds
    plain: list[PreTrainedModel] = []  # the merged model of the last round

    def evaluate_values(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        record = ledger.begin(0) if server_round == 0 else ledger.current
        if server_round % experiment.strategy.evaluate_every == 0 or server_round == last_round:
            clock = time.perf_counter()
            pet.load_values(torch.from_numpy(values_of(arrays).copy()), seed=plan.seed)
            if server_round == last_round:
                plain.append(pet.merged())
            model = plain[0] if plain else pet.model
            record.metric = evaluate(model, data.evaluation, data.task)
            record.evaluation_seconds = time.perf_counter() - clock
        ledger.close()
        listener.round_done(record, ledger)
        return None if record.metric is None else MetricRecord({data.task.metric: record.metric})

    listener.say("starting the rounds")
    result = strategy.start(
        grid,
        to_arrays(np.zeros(plan.num_values, dtype=np.float32)),
        num_rounds=last_round,
        timeout=experiment.strategy.round_deadline_seconds,
        evaluate_fn=evaluate_values,
    )
    values = values_of(result.arrays) if result.arrays else np.zeros(plan.num_values, np.float32)
    final = ledger.current.metric
    assert final is not None, "the last round is evaluated"
    listener.say("writing the plain model")
    out.write_outputs(values, plain[0], locate(experiment.backbone))
    summary = summarise(
        experiment,
        method="fedpet",
        ledger=ledger,
        data=data,
        fingerprint=plan.fingerprint,
        plan_digest=strategy.digest.hex(),
        values_by_kind=count_by_kind(pet.segments),
        pretrained_parameters=prepared.pretrained_parameters,
        added_parameters=_num_parameters(plain[0]) - prepared.all_parameters,
        inexact_kinds=pet.inexact_kinds,
        values_sha256=hashlib.sha256(values.astype("<f4").tobytes()).hexdigest(),
        final=final,
        total_seconds=time.perf_counter() - prepared.started,
    )
    out.write_result(summary)
    if not result.arrays:
        raise RunError(
            f"no round met its quorum of usable replies, so nothing was learned; "
            f"{out.path / 'rounds.jsonl'} says who was refused, and why."
        )
    return summary


def _num_parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _structure(experiment: Experiment, backbone: Backbone) -> Structure:
    """The structure that the experiment names, by file or as a preset."""
    config = experiment.structure
    if config.file:
        try:
            text = Path(config.file).read_text(encoding="utf-8")
        except OSError as error:
            raise StructureError(
                f"the structure's file {config.file!r} does not read: {error}."
            ) from None
        return Structure.from_json(text)
    positions = find_positions(backbone.model, backbone.head)
    return preset(config.preset, positions, rank=config.rank, scale=config.scale)
