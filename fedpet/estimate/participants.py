"""Draw the clients of every round, their rows, and the tier of each.

Where the data's clients are known, the run's seed draws the very ones of the run. Where only their
number is, as many are drawn, all with the same number of rows; the number that ever take part is
then an expectation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedpet.config import Experiment
from fedpet.data import ClientCounts
from fedpet.pet.tiers import draw_tier
from fedpet.server.client_pool import ClientPool
from fedpet.utils.seeds import client_id64, derive_seed

__all__ = ["ROWS_PER_CLIENT", "Draws", "Participant", "draw"]

ROWS_PER_CLIENT = 32  # where neither the data nor the user say


@dataclass(frozen=True)
class Participant:
    """Name one client of a round."""

    client: int  # names it
    num_rows: int
    tier: int  # index into the tiers, weakest first


@dataclass(frozen=True)
class Draws:
    """Hold the clients of every round.

    Attributes:
        num_clients: In the population.
        rounds: The clients of each round.
        newcomers: Clients that take part at least once: each is sent the plan. An expectation
            where the clients are not known.
        known: Whether the clients are the data's, drawn by the run's seed.
    """

    num_clients: int
    rounds: Sequence[Sequence[Participant]]
    newcomers: float
    known: bool

    @property
    def num_parts(self) -> int:
        """Count how often any client takes part."""
        return sum(map(len, self.rounds))


def draw(
    experiment: Experiment,
    census: ClientCounts | None,
    num_clients: int | None = None,
    rows_per_client: int | None = None,
) -> Draws:
    """Draw every round's clients.

    Args:
        experiment: Its strategy says how many and how often, its seed which, its mask the tiers.
        census: The data's clients; None where they are not known.
        num_clients: How many there are, without a census; None is clients.num-clients.
        rows_per_client: That each of them holds.
    """
    strategy, seed = experiment.strategy, experiment.run.seed
    rounds = range(1, strategy.num_rounds + 1)
    mask = experiment.mask if experiment.mask.enabled else None
    if census is not None:
        population = ClientPool(census.num_rows, homes={})
        drawn = [
            [
                Participant(number, census.num_rows[name], draw_tier(mask, number))
                for name in population.sample(r, strategy.clients_per_round, seed)
                for number in [client_id64(name)]
            ]
            for r in rounds
        ]
        newcomers = float(len({taker.client for takers in drawn for taker in takers}))
        return Draws(len(census.num_rows), drawn, newcomers, known=True)
    num_clients = num_clients or experiment.clients.num_clients
    taking_part = min(strategy.clients_per_round, num_clients)
    num_rows = rows_per_client or ROWS_PER_CLIENT
    drawn = []
    for r in rounds:
        generator = np.random.default_rng(derive_seed("sample", seed, r))
        chosen = generator.choice(num_clients, taking_part, replace=False).tolist()
        drawn.append([Participant(c, num_rows, draw_tier(mask, c)) for c in sorted(chosen)])
    never = (1 - taking_part / num_clients) ** strategy.num_rounds  # the odds of one client
    return Draws(num_clients, drawn, num_clients * (1 - never), known=False)
