"""Run the rounds of a search before those of training.

In:  a Grid, the search's plan, the run's folder.
Out: the structure, with how it was found; the search's lines in `rounds.jsonl`, and a journal after
     each round, from which a search that was cut short goes on.

The journal of the last round stays until training writes its own: whoever finds it beside a
`structure.json` of the same plan knows that the search is over, and how long its lines are.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from flwr.serverapp import Grid

from fedpet.backbone.module_roles import maskable_weights
from fedpet.client.node_config import cache_folder
from fedpet.client.state_store import state_folder
from fedpet.config import Experiment
from fedpet.pet.structure import Structure
from fedpet.protocol.flower_compat.flower_fleet import bound_replies
from fedpet.protocol.ledger import SEARCH, TRAINING, Ledger
from fedpet.protocol.registration import MAX_CLIENTS, MAX_NAME_BYTES
from fedpet.run.callbacks import Callback
from fedpet.run.central_search import origin_of
from fedpet.run.checkpoint_file import RunCheckpoint
from fedpet.run.resume import JournalWriter, restore_strategy
from fedpet.run.run_folder import RunFolder
from fedpet.run.run_state import refuse_stalled
from fedpet.server.allowed_nodes import AllowedNodes
from fedpet.server.client_pool import ClientPool, ConnectedClientPool
from fedpet.server.node_registry import NodeRegistry
from fedpet.server.rounds import SparseStrategy
from fedpet.server.schedule import chunk_size
from fedpet.strategies import StructureSearch
from fedpet.training.loop import count_examples
from fedpet.utils.gc_paused import kept_from_collection
from fedpet.utils.paths import expand

if TYPE_CHECKING:
    from fedpet.run.prepare import Prepared, PreparedSearch

__all__ = ["make_client_pool", "search_in_rounds", "with_registry"]

# At most, and roughly: of a frame's head or a refusal, and of a client in a registration.
FRAME_BYTES, ENTRY_BYTES = 4096, 2 * MAX_NAME_BYTES


def search_in_rounds(
    grid: Grid,
    to_search: PreparedSearch,
    population: ClientPool,
    ledger: Ledger,
    out: RunFolder,
    callback: Callback,
    journal: RunCheckpoint | None = None,
    *,
    resumed: int = 0,
) -> Structure:
    """Search until the structure has settled, and leave `structure.json`.

    Args:
        grid: Reaches the nodes.
        to_search: What to search.
        population: The clients; in a deployment it grows as nodes come.
        ledger: Its next rounds are the search's; what follows is training's again.
        out: Where `structure.json` and the journal go.
        callback: Is called at each round.
        journal: Of this search, where it goes on from; None begins at the beginning.
        resumed: How often the run has been gone on with.

    Raises:
        RunError: No round came to an average, or many in a row to none (`Stalled`).
    """
    experiment = to_search.experiment
    strategy = StructureSearch(
        plan=to_search.plan,
        tiers=to_search.tiers,
        population=population,
        config=experiment.strategy,
        ledger=ledger,
        space=to_search.space,
    )
    grid = with_registry(grid, strategy, population, experiment)
    if journal is not None:
        strategy.values = restore_strategy(out.path, journal, strategy)
    writer = JournalWriter(out.path, to_search, strategy, resumed=resumed)
    callback.on_stage("searching the structure on the clients")
    ledger.kind = SEARCH
    with kept_from_collection():
        while not strategy.is_over:
            strategy.run_round(grid)
            ledger_bytes = ledger.close()
            if ledger.current.aggregated or strategy.is_over:
                writer.write(
                    server_round=strategy.rounds_done,
                    values=strategy.values,
                    ledger_bytes=ledger_bytes,
                )
            callback.on_round_end(ledger.current, ledger)
            if not strategy.is_over:
                refuse_stalled(ledger)
    ledger.kind = TRAINING
    # Where nodes share this machine's cache, what they kept for the search goes with it.
    kept = state_folder(cache_folder(experiment), strategy.digest, strategy.requests.holders.run)
    shutil.rmtree(kept, ignore_errors=True)
    rows, masked = sum(population.num_rows.values()), to_search.plan.mask is not None
    structure = strategy.structure(
        {
            "inexact_kinds": list(to_search.inexact_kinds),
            **origin_of(experiment, rows=rows, masked=masked),
        },
        maskable_weights(to_search.backbone.model, to_search.backbone.head),
    )
    out.write_structure(structure)
    return structure


def make_client_pool(prepared: Prepared | PreparedSearch) -> ClientPool:
    """Return the clients of the data; in a deployment none as yet."""
    rule = prepared.plan.evaluation
    if prepared.experiment.clients.partition == "nodes":
        return ConnectedClientPool(rule=rule)
    examples = count_examples(prepared.data, prepared.data.task)
    return ClientPool(examples, homes={}, rule=rule)


def with_registry(
    grid: Grid, strategy: SparseStrategy, population: ClientPool, experiment: Experiment
) -> Grid:
    """Return the Grid of a strategy's rounds: in a deployment a roll call stands before it."""
    if not isinstance(population, ConnectedClientPool):
        return grid
    keys = experiment.clients.node_keys
    allowed = AllowedNodes(expand(keys)) if keys else None
    bound_replies(grid, _longest_reply(strategy, allowed))
    return NodeRegistry(
        grid,
        plan=strategy.plan.to_bytes(),
        residents=population,
        holders=strategy.requests.holders,
        expected=experiment.clients.num_clients,
        wait_seconds=experiment.strategy.node_wait_seconds,
        ledger=strategy.ledger,
        allowed=allowed,
    )


def _longest_reply(strategy: SparseStrategy, allowed: AllowedNodes | None) -> int:
    """Return the bytes that no reply of a node has more of: frames, or a registration."""
    longest = strategy.requests.longest_payload
    frames = 2 * chunk_size(longest) * (longest + FRAME_BYTES)
    most = (
        MAX_CLIENTS if allowed is None else max((n.clients for _, n in allowed.items()), default=1)
    )
    return max(frames, most * ENTRY_BYTES + FRAME_BYTES)
