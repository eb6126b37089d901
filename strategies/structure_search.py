"""Search a structure in rounds: clients search on their own rows, the server selects.

In:  a plan of a search: the space, the budget, the most rounds.
Out: a `Structure` under the budget, with its gates and its provenance.

A round is one of FedAvg: the same requests, frames, checks, refusals, quorum and ledger. It
averages alpha and the candidates' values, weighted by rows (fedpet/search/on_client.py is the
client's part); with `search.sends = "gates"` it averages alpha and the head, and clients keep the
candidates' values to themselves. The server then solves zeta, so that the expected size is the
budget, and selects.

    ends when   the selections of `settled_rounds` rounds in a row each had a Jaccard index of at
                least `settled_overlap` with the one before, or `rounds` rounds are over

A round that was not aggregated counts as a round, and its selection is not compared. The rates fall
to 0 over `rounds`, so a search that does not converge earlier does at its end.

Laws: the order of replies and the spread over nodes change no bit (law 6); the expected size is the
budget after every round, and the selected structure is never larger (law 8).

Reference: Hu et al. (S3PET), NeurIPS 2022, arXiv:2206.07382, for steps, gates and selection;
McMahan et al. (FedAvg), AISTATS 2017, arXiv:1602.05629, for the average. Ours: joining the two.
Deviations: the search averages by rows whatever rule training has; it takes the last round's alpha,
since no rows are left for validation; those of fedpet/search/on_client.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp import Grid

from fedpet.config import SearchConfig, StrategyConfig
from fedpet.errors import RunError
from fedpet.pet.structure import Structure
from fedpet.pet.tiers import Tier
from fedpet.protocol.ledger import Ledger
from fedpet.protocol.plan import Plan
from fedpet.search import (
    Space,
    candidate_records,
    deviations,
    probabilities,
    reproducible_settings,
    temperature,
)
from fedpet.server.aggregation import from_arrays, to_arrays
from fedpet.server.client_pool import ClientPool
from fedpet.server.rounds import SparseStrategy

from .fedavg import FedAvg

__all__ = ["StructureSearch", "overlap"]

SETTLED, ALL_ROUNDS = "settled", "all rounds"
DEVIATIONS = (
    "mean of the clients' alpha, zeta solved anew",
    "mean of the candidates' values under gates: not exact",
    "AdamW's moments begin anew in every round",
    "a client's rows in two halves of as many of each class, no validation rows",
)
_CHOICES, _AVERAGED = "search/choices", "search/averaged"


class StructureSearch(SparseStrategy):
    """Run the rounds of a search, until the selection no longer changes.

    Args:
        plan: Plan of a search.
        tiers: What clients of each strength train; alpha is everyone's.
        population: Clients, and the nodes they live on.
        config: Clients a round, quorum, deadlines. Its rule is training's.
        ledger: Counts the search's bytes, as of kind "search".
        space: The candidates.

    Attributes:
        values: The average so far: the model's values, then alpha; float32, (num_values,).
        averaged: Rounds that were aggregated.
    """

    def __init__(
        self,
        *,
        plan: Plan,
        tiers: Sequence[Tier],
        population: ClientPool,
        config: StrategyConfig,
        ledger: Ledger,
        space: Space,
    ) -> None:
        assert plan.search is not None, "a plan of a search"
        super().__init__(
            plan=plan,
            tiers=tiers,
            population=population,
            config=_averaging(config, plan.search),
            ledger=ledger,
        )
        self.search: SearchConfig = plan.search
        self._losses = plan.training.logit_adjustment, plan.training.loss
        self.space = space
        self.averaged = 0
        self.values = np.zeros(plan.num_values, dtype=np.float32)
        self._sizes = torch.tensor(space.sizes, dtype=torch.float64)
        self._choices: list[list[int]] = []  # of the last rounds, as many as settling looks at

    # -- what stands after a round -----------------------------------------------------------

    @property
    def alpha(self) -> torch.Tensor:
        """The mean alpha, float64, (candidates,)."""
        return torch.from_numpy(self.values[-len(self._sizes) :].astype(np.float64))

    @property
    def probabilities(self) -> torch.Tensor:
        """p of every candidate under the mean alpha, zeta solved for it, float64."""
        beta = temperature(self.search, self.rounds_done / self.search.rounds)
        return probabilities(self.alpha, self._sizes, float(self.search.budget), beta)

    def choice(self) -> list[int]:
        """Return the candidates that selection takes now, likeliest first."""
        budget = float(self.search.budget)
        return self.space.select(self.alpha.tolist(), budget)

    @property
    def overlaps(self) -> list[float]:
        """Jaccard index of each remembered choice with the one before, oldest first."""
        return [overlap(a, b) for a, b in zip(self._choices, self._choices[1:], strict=False)]

    @property
    def has_settled(self) -> bool:
        """Tell if enough of the last choices in a row were alike."""
        last = self.overlaps[-self.search.settled_rounds :]
        enough = len(last) == self.search.settled_rounds
        return enough and min(last, default=1.0) >= self.search.settled_overlap

    @property
    def is_over(self) -> bool:
        """Tell if the search has ended."""
        return self.has_settled or self.rounds_done >= self.search.rounds

    # -- the rounds --------------------------------------------------------------------------

    def run_round(self, grid: Grid) -> None:
        """Run one round of Flower's loop, which has no early end of its own."""
        self.start(
            grid,
            to_arrays(self.values),
            num_rounds=1,
            timeout=self.config.round_deadline_seconds,
        )
        self.rounds_done += 1

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average alpha and values; then choose."""
        arrays, metrics = super().aggregate_train(server_round, replies)
        if arrays is not None:
            self.values = from_arrays(arrays)
            self.averaged += 1
            self._choices = [*self._choices, self.choice()][-self.search.settled_rounds - 1 :]
            self.ledger.current.overlap = self.overlaps[-1] if self.overlaps else None
        return arrays, metrics

    # -- the end -----------------------------------------------------------------------------

    def structure(
        self,
        provenance: Mapping[str, Any],
        params: Mapping[str, torch.Tensor] | None = None,
    ) -> Structure:
        """Return the selected structure.

        Args:
            params: Weights in the mask's scope, see `maskable_weights`; of a space with blocks
                of the mask.
            provenance: Further entries of its provenance.

        Raises:
            RunError: No round was aggregated.
        """
        if not self.averaged:
            raise RunError(
                "no round of the search met its quorum of usable replies, so there is no "
                "structure; the search's rounds in rounds.jsonl say who was refused, and why."
            )
        config, space, p = self.search, self.space, self.probabilities.tolist()
        chosen = self.choice()
        found = {
            "method": "s3pet",
            "federated": True,
            "deviations": [*deviations(config, *self._losses), *DEVIATIONS],
            "settings": reproducible_settings(config),
            "budget": int(config.budget),
            "values": space.chosen_size(chosen),
            "space": {"name": space.name, "values": space.num_values},
            "search": {
                "rounds": self.rounds_done,
                "averaged": self.averaged,
                "of": config.rounds,
                "ended": SETTLED if self.has_settled else ALL_ROUNDS,
                "overlaps": self.overlaps,
                "clients": len(self._names),
                "clients_per_round": self.config.clients_per_round,
                "seed": self.plan.seed,
                "plan_digest": self.digest.hex(),
                "uplink_bytes": int(self.ledger.total("uplink_bytes", "search")),
                "downlink_bytes": int(self.ledger.total("downlink_bytes", "search")),
                "plan_bytes": int(self.ledger.total("plan_bytes", "search")),
            },
            "candidates": candidate_records(space, p),
            **provenance,
        }
        return replace(
            space.found(chosen, params or {}),
            fingerprint=self.plan.fingerprint,
            gates=space.gates_of(chosen, p),
            provenance=found,
        )

    # -- from run to run ---------------------------------------------------------------------

    def state(self) -> dict[str, np.ndarray]:
        """Return the state of the rounds, and the last choices."""
        chosen = np.zeros((len(self._choices), len(self._sizes)), dtype=np.uint8)
        for row, choice in zip(chosen, self._choices, strict=True):
            row[choice] = 1
        averaged = np.array([self.averaged], dtype=np.int64)
        return super().state() | {_CHOICES: chosen, _AVERAGED: averaged}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Go back to a `state`."""
        super().load_state(state)
        if _CHOICES in state:
            self._choices = [np.flatnonzero(row).tolist() for row in state[_CHOICES]]
            self.averaged = int(state[_AVERAGED][0])


def overlap(one: Iterable[int], other: Iterable[int]) -> float:
    """Return the Jaccard index of two choices: the fraction of their union that both have."""
    first, second = set(one), set(other)
    return len(first & second) / max(1, len(first | second))


def _averaging(config: StrategyConfig, search: SearchConfig) -> StrategyConfig:
    """Return the settings of training's rounds, with FedAvg as the rule."""
    return FedAvg(
        num_rounds=search.rounds,
        clients_per_round=config.clients_per_round,
        quorum=config.quorum,
        min_replies=config.min_replies,
        round_deadline_seconds=config.round_deadline_seconds,
        node_wait_seconds=config.node_wait_seconds,
    )
