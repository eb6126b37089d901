"""Draw the clients of every round, their rows, and the tier of each.

Where the data's clients are known, the run's seed draws the very ones of the run. Where only their
number is, as many are drawn, all with the same number of rows; the number that ever take part is
then an expectation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedpet.config import ClientEvaluation, Experiment
from fedpet.data import ClientCounts
from fedpet.pet.tiers import draw_tier
from fedpet.server.client_pool import ClientPool
from fedpet.utils.seeds import client_id64, derive_seed

__all__ = ["Draws", "Participant", "draw"]

ROWS_PER_CLIENT = 32  # where neither the data nor the user say


@dataclass(frozen=True)
class Participant:
    """Name one client of a round."""

    client: int  # names it
    num_rows: int  # that it trains on
    tier: int  # index into the tiers, weakest first
    measures: bool = False  # it holds rows out, and measures on them


@dataclass(frozen=True)
class Draws:
    """Hold the clients of every round."""

    num_clients: int  # in the population
    rounds: Sequence[Sequence[Participant]]
    newcomers: float  # that take part at least once, an expectation where clients are not known
    known: bool  # whether the clients are the data's, drawn by the run's seed
    unseen: float = 0.0  # clients that never train, an expectation where they are not known


def draw(
    experiment: Experiment, census: ClientCounts | None, num_clients: int | None, rows: int | None
) -> Draws:
    """Draw every round's clients.

    Args:
        experiment: Its strategy says how many and how often, its seed which, its mask the tiers.
        census: The data's clients; None where they are not known.
        num_clients: How many there are, without a census; None is clients.num-clients.
        rows: That each of them holds.
    """
    strategy, seed = experiment.strategy, experiment.run.seed
    mask = experiment.mask if experiment.mask.enabled else None
    rule = ClientEvaluation.of(experiment.clients)
    pool = ClientPool(census.num_rows, homes={}, rule=rule) if census is not None else None
    total = len(pool.num_rows) if pool else num_clients or experiment.clients.num_clients
    unseen = len(pool.unseen()) if pool else total * (rule.unseen_fraction if rule else 0.0)
    training = max(total - round(unseen), 1)
    taking_part = min(strategy.clients_per_round, training)
    fraction = rule.fraction if rule else 0.0
    rounds = []
    for r in range(1, strategy.num_rounds + 1):
        if pool is not None:
            names = pool.sample(r, taking_part, seed)
            assert census is not None
            chosen = [
                (client_id64(name), pool.num_rows[name], census.num_held_out[name] > 0)
                for name in names
            ]
        else:
            generator = np.random.default_rng(derive_seed("sample", seed, r))
            drawn = sorted(generator.choice(training, taking_part, replace=False).tolist())
            size = max(round((rows or ROWS_PER_CLIENT) * (1 - fraction)), 1)
            chosen = [(client, size, fraction > 0) for client in drawn]
        rounds.append([Participant(c, size, draw_tier(mask, c), own) for c, size, own in chosen])
    if pool is not None:
        newcomers = float(len({taker.client for takers in rounds for taker in takers}))
    else:  # one client takes part in none of the rounds with the odds of the power
        newcomers = training * (1 - (1 - taking_part / training) ** strategy.num_rounds)
    return Draws(total, rounds, newcomers, known=pool is not None, unseen=unseen)
