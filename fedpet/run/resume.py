"""Resume a run that was cut short, after the last round in its journal.

In:  a run folder without a result.
Out: its experiment, what was settled of it, and the journal, once they are known to belong
     together; and the journal of a round itself, which is what a run is taken up from.

The experiment is read from the folder, the plan is settled anew from it: where the checkpoint, the
rows or the settings are no longer those of the run, that is said and nothing is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpet.config import Experiment, StrategyConfig
from fedpet.config.experiment import located
from fedpet.errors import ConfigError
from fedpet.pet.structure import Structure
from fedpet.protocol.ledger import SEARCH
from fedpet.protocol.plan import Plan
from fedpet.run.checkpoint_file import (
    RunCheckpoint,
    read_journal,
    write_journal,
    writing_journal,
)
from fedpet.run.client_journal import ClientJournal, read_records
from fedpet.run.client_quality import KeptRound
from fedpet.utils.atomic_write import sync
from fedpet.utils.lock import locked_folder

if TYPE_CHECKING:
    from fedpet.data import FederatedData
    from fedpet.run.prepare import Prepared, PreparedSearch
    from fedpet.server.rounds import SparseStrategy

__all__ = [
    "JournalWriter",
    "check_journal",
    "client_hash",
    "cut_short",
    "deciding_settings",
    "is_cut_short",
    "read_cut_short",
    "restore_strategy",
    "searched_structure",
]

# Keys that say where a run is done, and what it is called; not what comes out.
_PLACE_KEYS = ("name", "workers", "cache", "out", "callbacks")


def is_cut_short(run: Path) -> bool:
    """Tell a folder that holds a run without a result."""
    return (run / "config.toml").is_file() and not (run / "result.json").exists()


def read_cut_short(run: Path, strategy: StrategyConfig | None = None) -> Experiment:
    """Read the experiment of a run that has no result yet, with the run's folder as its place.

    Args:
        run: Its folder.
        strategy: Of a run whose strategy is a class of the user's own, which no file holds.

    Raises:
        ConfigError: The folder holds no run, or one that is finished.
    """
    if not (run / "config.toml").is_file():
        raise ConfigError(
            f"{str(run)!r} is no run folder: config.toml is absent. A run that was stopped before "
            "it left one has nothing to resume: start it again."
        )
    if (run / "result.json").exists():
        raise ConfigError(f"the run in {str(run)!r} is finished: there is nothing to resume.")
    if strategy is None:
        experiment = Experiment.from_file(run / "config.toml")
    else:
        tables = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))
        del tables["strategy"]
        experiment = replace(Experiment.from_tables(tables), strategy=strategy)
    return replace(experiment, run=replace(experiment.run, out=str(run)))


@contextmanager
def cut_short(run: Path, strategy: StrategyConfig | None = None) -> Iterator[Experiment]:
    """Lock the folder of a run that was cut short; gives its experiment.

    Raises:
        ConfigError: The folder holds no run, one that is finished, or one that still goes on.
    """
    read_cut_short(run, strategy)  # what is no run's folder gets no lock
    with locked_folder(run):
        yield read_cut_short(run, strategy)


def searched_structure(run: Path) -> Structure | None:
    """Read the structure that a cut-short run searched; None where it has none yet.

    Raises:
        InputError: The journal or the structure cannot be read.
    """
    journal, path = read_journal(run), run / "structure.json"
    if journal is None or not path.exists():
        return None
    structure = Structure.from_json(path.read_text(encoding="utf-8"))
    if journal.kind == SEARCH and _searched_by(structure) != journal.plan_digest:
        return None  # left there by something else
    return structure


def check_journal(run: Path, prepared: Prepared | PreparedSearch) -> RunCheckpoint | None:
    """Read the journal of a run and compare it with what was prepared; None where there is none.

    Where a search has ended and training has not begun, it is the search's last.

    Raises:
        ConfigError: The settings, the clients or the plan are others than the journal's.
    """
    journal = read_journal(run)
    if journal is None:
        return None
    # An earlier version kept relative paths; whoever resumes it stands where it was started.
    changed = _changed(located(journal.settings), deciding_settings(prepared.experiment))
    if changed:
        raise ConfigError(
            f"the journal in {str(run)!r} was written under other settings: {'; '.join(changed)}. "
            "Put config.toml back as it was, or start a new run."
        )
    if journal.clients != client_hash(prepared.data):
        raise ConfigError(
            f"the journal in {str(run)!r} was written with other clients: the rows have changed "
            "since. Put them back, or start a new run."
        )
    digest = Plan.digest(prepared.plan.to_bytes()).hex()
    if journal.kind == SEARCH and prepared.plan.search is None:
        digest = _searched_by(getattr(prepared, "structure", Structure()))
    if journal.plan_digest != digest:
        raise ConfigError(
            f"the journal in {str(run)!r} is of plan {journal.plan_digest:.16}, and what is "
            f"settled here is plan {digest:.16}: resume with the checkpoint and the fedpet that "
            "the run began with."
        )
    return journal


class JournalWriter:
    """Write the journal after rounds of one strategy.

    Args:
        folder: The run's.
        prepared: What is run.
        strategy: Whose rounds they are.
        resumed: How often the run has been gone on with.
    """

    def __init__(
        self,
        folder: Path,
        prepared: Prepared | PreparedSearch,
        strategy: SparseStrategy,
        *,
        resumed: int,
    ) -> None:
        self._folder = folder
        self._prepared = prepared
        self._strategy = strategy
        self._resumed = resumed
        self._clients_hash = client_hash(prepared.data)
        self._settings = deciding_settings(prepared.experiment)
        self._clients = ClientJournal(folder)

    def write(
        self,
        *,
        server_round: int,
        values: np.ndarray,
        ledger_bytes: int,
        kept: KeptRound | None = None,
    ) -> None:
        """Write down where a run stands when a round is over.

        Args:
            server_round: That round.
            values: Global values, float32, (num_values,).
            ledger_bytes: Length of `rounds.jsonl`, this round's line included.
            kept: The best round so far, where its model is the run's.

        Raises:
            RunError: The disk does not take it. The journal before stays, and what it names.
        """
        strategy = self._strategy
        holders, books = strategy.requests.holders, strategy.ledger.path
        with writing_journal(self._folder, server_round):
            if books is not None:  # the journal vouches for its length
                sync(books, os.O_RDWR)
            clients_file = self._clients.write(holders)
        journal = RunCheckpoint(
            server_round=server_round,
            plan_digest=strategy.digest.hex(),
            clients=self._clients_hash,
            settings=self._settings,
            ledger_bytes=ledger_bytes,
            holders=tuple(sorted(holders.plan_nodes)),
            clients_file=clients_file,
            elapsed_seconds=time.perf_counter() - self._prepared.started,
            resumed=self._resumed,
            values=values,
            optimiser=strategy.state(),
            kind=strategy.ledger.kind,
            kept=kept,
        )
        write_journal(self._folder, journal)
        self._clients.remove_older()


def restore_strategy(folder: Path, journal: RunCheckpoint, strategy: SparseStrategy) -> np.ndarray:
    """Hand a strategy its part of a journal; gives the global values, float32, (num_values,).

    Raises:
        ConfigError: The records of clients in the run's folder were damaged.
        RunError: The journal is of another plan, or of other clients.
    """
    strategy.rounds_done = journal.server_round
    strategy.load_state(journal.optimiser)
    strategy.requests.holders.plan_nodes = set(journal.holders)
    strategy.requests.holders.load_records(read_records(folder, journal.clients_file))
    return journal.values


def deciding_settings(experiment: Experiment) -> dict[str, Any]:
    """Return the tables of an experiment without the keys that only say where it is run."""
    tables = experiment.to_tables()
    for key in _PLACE_KEYS:
        del tables["run"][key]
    return tables


def client_hash(data: FederatedData) -> str:
    """SHA-256 (hex) over the clients' names and numbers of rows."""
    text = json.dumps([[client.id, len(client.rows)] for client in data.clients])
    return hashlib.sha256(text.encode()).hexdigest()


def _searched_by(structure: Structure) -> str:
    """Return the digest (hex) of the plan by which a structure was searched; "" for none."""
    search = structure.provenance.get("search")
    return str(search.get("plan_digest", "")) if isinstance(search, dict) else ""


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    return [
        f"{stage}.{key} was {before.get(stage, {}).get(key)!r}, is {value!r}"
        for stage, table in after.items()
        for key, value in table.items()
        if before.get(stage, {}).get(key) != value
    ]
