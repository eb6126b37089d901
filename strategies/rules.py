"""The strategies by name: Flower's rules with the rounds of a plan in front of them."""

from __future__ import annotations

from flwr.serverapp.strategy import FedAvg

from .metered import Metered
from .rounds import SparseRounds


class SparseFedAvg(Metered, SparseRounds, FedAvg):
    """Flower's FedAvg over the sparse values of a plan.

    Equality (law 4): with density 1, every Linear in scope and a lossless codec, the result is
    that of `flwr.serverapp.strategy.FedAvg` on the same replies, to 1e-6. Whatever the order of
    the replies and the spread of clients over nodes, the result is the same bits.

    Args:
        plan: What all clients agree on.
        groups: Runs of values of one kind, see `fedpet.plan.groups_by_kind`.
        population: Clients, and where they live.
        config: Clients a round, quorum, deadlines.
        ledger: Where bytes, refusals and seconds are counted.
    """
