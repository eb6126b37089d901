"""A run from end to end, on any Grid: simulated, deployed, or in one process.

    backbone -> mask -> structure -> model -> codec
             -> plan -> client -> strategy -> ledger -> report

Everything that decides the run is settled before the first message; the rounds are Flower's own
loop; afterwards the values are folded into a plain model, and the books are closed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from flwr.serverapp import Grid

from fedpet.backbone import Backbone, load_backbone, locate
from fedpet.client import cache_folder
from fedpet.config import Experiment
from fedpet.data import Client, FederatedData, load_data, load_evaluation
from fedpet.errors import ConfigError, RunError
from fedpet.ledger import Ledger, RoundRecord
from fedpet.model import PetModel
from fedpet.node_state import state_folder
from fedpet.plan import Plan, check_codecs, make_plan
from fedpet.population import Population, Residents
from fedpet.positions import find_positions
from fedpet.search import check_structure
from fedpet.strategies import STRATEGIES, RollCall, TierBook, to_arrays
from fedpet.structure import Structure, settled_structure
from fedpet.tiers import tiers_of

from .journal import Journal, remove_journal
from .run_folder import RunFolder
from .state import RunState
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
    structure: Structure  # with what a search tells of it; the plan has its modules alone
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
    check_codecs(experiment.codec)
    listener.say("reading and tokenising the rows")
    folder, cache = locate(experiment.backbone), cache_folder(experiment)
    if is_deployed(experiment):
        data = load_evaluation(experiment.data, folder, cache=cache)
    else:
        data = load_data(experiment.data, experiment.population, folder, cache=cache)
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
    _check_enough_clients(experiment, data)
    plan, pet = make_plan(experiment, backbone, structure, data.task, data.tokenizer_hash)
    return Prepared(
        experiment, data, structure, plan, pet, all_parameters, pretrained_parameters, started
    )


def is_deployed(experiment: Experiment) -> bool:
    """Whether the nodes bring the clients, and the server knows of none beforehand."""
    return experiment.population.partition == "nodes"


def federate(
    grid: Grid,
    prepared: Prepared,
    out: RunFolder,
    listener: Listener,
    journal: Journal | None = None,
) -> dict[str, Any]:
    """Run the rounds and leave the run folder.

    Args:
        grid: Reaches the nodes.
        prepared: What to run; its model is used up.
        out: Where everything goes that the run leaves.
        listener: Is told of stages and rounds.
        journal: Where a run that was cut short goes on from; None begins at the beginning.

    Returns:
        What `result.json` holds.

    Raises:
        RunError: No round came to an average.
        ConfigError: The folder's books are not those that the journal was written beside.
    """
    experiment, plan, pet = prepared.experiment, prepared.plan, prepared.pet
    torch.set_num_threads(os.cpu_count() or 1)  # the server evaluates while the nodes are idle
    out.write_inputs(experiment, plan, prepared.structure)
    ledger = Ledger.reopen(out.path / "rounds.jsonl", journal.ledger_bytes if journal else 0)
    residents = Residents() if is_deployed(experiment) else None
    strategy = STRATEGIES[experiment.strategy.name](
        plan=plan,
        tiers=tiers_of(pet, plan.mask),
        population=_population(prepared.data) if residents is None else residents,
        config=experiment.strategy,
        ledger=ledger,
    )
    if residents is not None:
        grid = RollCall(
            grid,
            plan=plan.to_bytes(),
            residents=residents,
            holders=strategy.requests.holders,
            expected=experiment.population.num_clients,
            wait_seconds=experiment.strategy.node_wait_seconds,
            ledger=ledger,
        )
    state = RunState(prepared, strategy, ledger, out, listener, journal)
    listener.say("starting the rounds" if journal is None else "going on with the rounds")
    if state.rounds_left:
        strategy.start(
            grid,
            to_arrays(state.values),
            num_rounds=state.rounds_left,
            timeout=experiment.strategy.round_deadline_seconds,
            evaluate_fn=state.round_over,
        )
    model = state.final_model()
    # Where nodes share this machine's cache, what they kept for the rounds to come goes with them.
    kept = state_folder(cache_folder(experiment), strategy.digest, strategy.requests.holders.run)
    shutil.rmtree(kept, ignore_errors=True)
    final = ledger.current.metric
    assert final is not None, "the last round is evaluated"
    listener.say("writing the plain model")
    out.write_outputs(state.values, model, locate(experiment.backbone))
    summary = summarise(
        experiment,
        method="fedpet",
        ledger=ledger,
        data=prepared.data if residents is None else _with_clients(prepared.data, residents),
        fingerprint=plan.fingerprint,
        plan_digest=strategy.digest.hex(),
        values_by_kind=count_by_kind(pet.segments),
        tiers=_tiers(strategy.tiers),
        pretrained_parameters=prepared.pretrained_parameters,
        added_parameters=_num_parameters(model) - prepared.all_parameters,
        inexact_kinds=pet.inexact_kinds,
        values_sha256=hashlib.sha256(state.values.astype("<f4").tobytes()).hexdigest(),
        final=final,
        total_seconds=state.elapsed_seconds,
        resumed=state.resumed,
    )
    out.write_result(summary)
    remove_journal(out.path)
    if not any(record.aggregated for record in ledger.rounds):
        raise RunError(
            f"no round met its quorum of usable replies, so nothing was learned; "
            f"{out.path / 'rounds.jsonl'} says who was refused, and why."
        )
    return summary


def _with_clients(data: FederatedData, residents: Residents) -> FederatedData:
    """With all that ever came; their rows are counted from 0, each on its own node."""
    rows = sorted(residents.num_rows.items())
    return replace(data, clients=tuple(Client(name, np.arange(count)) for name, count in rows))


def _population(data: FederatedData) -> Population:
    return Population({client.id: len(client.rows) for client in data.clients}, homes={})


def _num_parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _check_enough_clients(experiment: Experiment, data: FederatedData) -> None:
    """Refuse a run none of whose rounds could have the replies that its rule needs."""
    least = experiment.strategy.least_replies
    clients = experiment.population.num_clients if is_deployed(experiment) else len(data.clients)
    if clients < least:
        raise ConfigError(
            f"strategy {experiment.strategy.name!r} with these parameters, and min-replies, need "
            f"{least} usable replies a round, and there are {clients} clients "
            f"({data.left_out_clients} have too few rows): take another strategy or other "
            "parameters."
        )


def _tiers(book: TierBook) -> list[dict[str, Any]]:
    """What clients of each strength send, and how many there are; [] where all are alike."""
    if len(book.tiers) == 1:
        return []
    return [
        {"density": tier.density, "values": tier.count, "clients": clients}
        for tier, clients in zip(book.tiers, book.num_clients(), strict=True)
    ]


def _structure(experiment: Experiment, backbone: Backbone) -> Structure:
    """The structure that the experiment names, of this backbone."""
    positions = find_positions(backbone.model, backbone.head)
    structure = settled_structure(experiment.structure, positions)
    check_structure(structure, backbone.fingerprint)
    return structure
