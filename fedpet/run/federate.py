"""Run a federation from end to end, on any Grid: simulated, deployed, or in one process.

Everything that decides the run is known before the first message (`prepare`); where clients search
the structure, that comes first (`federated_search`) and training's plan is made after it.
The rounds are Flower's own loop; afterwards the values are folded into a plain model, and the books
are closed.

A run fails, and `run.status` in `result.json` says so, where no round came to an average, or the
last one did not: everything is written nonetheless, with the values of the last average. It stops
before its end where several rounds in a row came to none (`state.STALLED_ROUNDS`).
"""

from __future__ import annotations

import hashlib
import shutil
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from flwr.serverapp import Grid

from fedpet.backbone.pretrained import locate
from fedpet.client.node_config import cache_folder
from fedpet.client.state_store import state_folder
from fedpet.data import Client, FederatedData, count_classes
from fedpet.errors import RunError
from fedpet.pet.mask_ties import describe_ties
from fedpet.pet.tiers import tiers_of
from fedpet.protocol.ledger import SEARCH, TRAINING, Ledger
from fedpet.run.callbacks import Callback, RunStart
from fedpet.run.checkpoint_file import RunCheckpoint, remove_journal
from fedpet.run.federated_search import make_client_pool, search_in_rounds, with_registry
from fedpet.run.prepare import Prepared, PreparedSearch, prepare
from fedpet.run.quality import refuse_diverged
from fedpet.run.result import count_by_kind, summarise
from fedpet.run.run_folder import RunFolder
from fedpet.run.run_state import RunState
from fedpet.server.aggregation import to_arrays
from fedpet.server.client_pool import ClientPool, ConnectedClientPool
from fedpet.server.rounds import SparseStrategy
from fedpet.server.tier_assignment import TierAssignment
from fedpet.utils.cores import usable_cores

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fedpet.pet.model import PetModel

__all__ = ["Prepared", "PreparedSearch", "federate", "prepare"]


def federate(
    grid: Grid,
    prepared: Prepared | PreparedSearch,
    out: RunFolder,
    callback: Callback,
    journal: RunCheckpoint | None = None,
) -> dict[str, Any]:
    """Run the rounds and leave the run folder.

    Args:
        grid: Reaches the nodes.
        prepared: What to run; its model, or backbone, is used up.
        out: Where everything goes that the run leaves.
        callback: Is called at stages and rounds.
        journal: Where a run that was cut short goes on from; None begins at the beginning.

    Returns:
        What `result.json` holds.

    Raises:
        RunError: No round came to an average, or the last one did not, or the final model's outputs
            are not finite.
        Stalled: Many in a row did not; nothing is finished, and the run can be gone on with.
        ConfigError: The folder's books are not those that the journal was written beside.
    """
    experiment, resumed = prepared.experiment, 0
    torch.set_num_threads(usable_cores())  # the server evaluates while the nodes are idle
    if journal is not None:
        resumed = journal.resumed + 1
        prepared = replace(prepared, started=prepared.started - journal.elapsed_seconds)
    out.write_inputs(experiment, prepared.plan)
    if classes := count_classes(prepared.data):
        out.write_classes(classes)
    ledger = Ledger.reopen(out.path / "rounds.jsonl", journal.ledger_bytes if journal else 0)
    ledger.on_reply = callback.on_reply
    population = make_client_pool(prepared)
    clients = len(prepared.data.clients)
    callback.on_run_start(
        RunStart(experiment=experiment, folder=out.path, num_clients=clients, resumed=resumed)
    )
    if isinstance(prepared, PreparedSearch):
        structure = search_in_rounds(
            grid, prepared, population, ledger, out, callback, journal, resumed=resumed
        )
        prepared, journal = prepared.with_structure(structure), None
        out.write_inputs(experiment, prepared.plan)
    elif journal is not None and journal.kind == SEARCH:
        journal = None  # the search was over, and training had not begun
    out.write_structure(prepared.structure)
    plan, pet = prepared.plan, prepared.pet
    if ties := _mask_ties(pet):
        callback.on_stage(f"warning: {ties}")
    strategy = SparseStrategy(
        plan=plan,
        tiers=tiers_of(pet, plan.mask),
        population=population,
        config=experiment.strategy,
        ledger=ledger,
    )
    grid = with_registry(grid, strategy, population, experiment)
    state = RunState(prepared, strategy, ledger, out, callback, journal, resumed=resumed, grid=grid)
    callback.on_stage("starting the rounds" if journal is None else "going on with the rounds")
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
    state.write_samples(model, "after")
    callback.on_stage("writing the plain model")
    out.write_outputs(state.values, model, locate(experiment.backbone))
    summary = summarise(
        experiment,
        method="fedpet",
        ledger=ledger,
        data=_with_clients(prepared.data, population),
        fingerprint=plan.fingerprint,
        plan_digest=strategy.digest.hex(),
        values_by_kind=count_by_kind(pet.segments),
        tiers=_tiers(strategy.tiers),
        structure_method=str(prepared.structure.provenance.get("method", "")),
        pretrained_parameters=prepared.pretrained_parameters,
        added_parameters=_num_parameters(model) - prepared.all_parameters,
        inexact_kinds=pet.inexact_kinds,
        values_sha256=hashlib.sha256(state.values.astype("<f4").tobytes()).hexdigest(),
        final=state.final_assessment(),
        kept=state.kept,
        total_seconds=time.perf_counter() - prepared.started,
        resumed=resumed,
        origin=prepared.origin,
        training=plan.training,
    )
    out.write_card(experiment, summary)
    out.write_result(summary)
    remove_journal(out.path)
    callback.on_run_end(summary, out.path)
    averaged = [record.round for record in ledger.of_kind(TRAINING) if record.aggregated]
    if not averaged:
        raise RunError(
            f"no round met its quorum of usable replies, so nothing was learned; "
            f"{out.path / 'rounds.jsonl'} says who was refused, and why."
        )
    refuse_diverged(summary)
    if averaged[-1] != ledger.current.round:
        raise RunError(
            f"the last round that met its quorum of usable replies is round {averaged[-1]} of "
            f"{ledger.current.round}, and {out.path / 'model'} is the model after it; "
            f"{out.path / 'rounds.jsonl'} says who was refused since, and why."
        )
    return summary


def _with_clients(data: FederatedData, population: ClientPool) -> FederatedData:
    """Add the clients that nodes of a deployment brought, with rows that take no memory.

    How many there are is the nodes' word: an array is made of no such number.
    """
    if not isinstance(population, ConnectedClientPool):
        return data
    rows = sorted(population.num_rows.items())
    return replace(
        data, clients=tuple(Client(name, np.broadcast_to(0, count)) for name, count in rows)
    )


def _mask_ties(pet: PetModel) -> str:
    """Say whether ties fill the mask; its values are still zero, the weights the checkpoint's."""
    if pet.mask is None or pet.mask_config is None:
        return ""
    weights = {name: pet.model.get_parameter(name) for name in pet.mask.sizes}
    return describe_ties(weights, pet.mask, pet.mask_config)


def _num_parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _tiers(book: TierAssignment) -> list[dict[str, Any]]:
    """Return density, values and clients of each tier; [] where there is one."""
    if len(book.tiers) == 1:
        return []
    return [
        {"density": tier.density, "values": tier.count, "clients": clients}
        for tier, clients in zip(book.tiers, book.num_clients(), strict=True)
    ]
