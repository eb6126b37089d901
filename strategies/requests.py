"""What a round sends: to each node its cohort, the global values, and the plan if it may lack it.

    ... -> codec -> plan -> client -> [strategy] -> ledger -> report

In:  the global values, the round, the nodes that are there.
Out: one train message a node.

Where clients differ in tier, a message carries a frame for each tier in its cohort, and each client
reads its own: what it reads does not depend on whom it shares a node with (law 6).

Who has been sent the plan is remembered here, twice: by node, which decides whether the plan goes
along, and by client, each counted alone, for the ledger.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid

from fedpet.codec import encode_values
from fedpet.codec.frame import Frame, pack_frame
from fedpet.config import StrategyConfig
from fedpet.errors import RunError
from fedpet.ledger import Ledger
from fedpet.messages import Request, solo_bytes, to_record, write_request
from fedpet.plan import Plan
from fedpet.population import Population
from fedpet.seeds import client_number, derive_seed
from fedpet.tiers import Tier

from .tiers import TierBook


@dataclass
class Again:
    """Who is to be asked a second time, since the first could not be answered.

    Attributes:
        lacking: Nodes that lack the plan.
        other_tier: Node -> its clients that it trains at another tier than it was asked for.
    """

    lacking: list[int] = field(default_factory=list)
    other_tier: dict[int, list[str]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.lacking or self.other_tier)


class Requests:
    """Makes the train messages of one round after another.

    Attributes:
        digest: By which messages name the plan.
        sampled: The clients of the round in hand, in alphabetical order.
        cohorts: Node -> its clients in this round.
        holders: Nodes known to hold the plan.
        told: Clients that have been sent the plan.
    """

    def __init__(
        self,
        *,
        plan: Plan,
        tiers: TierBook,
        population: Population,
        config: StrategyConfig,
        ledger: Ledger,
    ) -> None:
        self._plan = plan
        self._plan_bytes = plan.to_bytes()
        self._tiers = tiers
        self._population = population
        self._config = config
        self._ledger = ledger
        self._frames: dict[int, bytes] = {}  # tier -> the round's global values
        self.digest = Plan.digest(self._plan_bytes)
        self.sampled: list[str] = []
        self.cohorts: dict[int, list[str]] = {}
        self.holders: set[int] = set()
        self.told: set[str] = set()

    def of_round(
        self, server_round: int, values: np.ndarray, nodes: Sequence[int]
    ) -> list[Message]:
        """Draw the round's clients and ask the nodes to train them.

        Args:
            server_round: Counted from 1.
            values: Global values, float32, (num_values,).
            nodes: Ids of the nodes that are there.
        """
        self.sampled = self._population.sample(
            server_round, self._config.clients_per_round, self._plan.seed
        )
        self.cohorts = self._population.cohorts(self.sampled, nodes)
        self._round, self._values, self._frames = server_round, values, {}
        self._count()
        return [self._message(node, names) for node, names in self.cohorts.items()]

    def again(self, asked: Again) -> list[Message]:
        """The same once more, to those who could not answer as they were asked."""
        self.holders.difference_update(asked.lacking)
        others = [name for names in asked.other_tier.values() for name in names]
        self._ledger.count_client(down=self._solo_all(others))
        whole = {node: self.cohorts[node] for node in asked.lacking}
        return [self._message(node, names) for node, names in (whole | asked.other_tier).items()]

    def _frame(self, tier: int) -> bytes:
        """The global values of one tier, encoded once a round."""
        if tier not in self._frames:
            self._frames[tier] = self._encode(self._round, self._tiers.tiers[tier], self._values)
        return self._frames[tier]

    def _encode(self, server_round: int, tier: Tier, values: np.ndarray) -> bytes:
        codec = self._plan.codec.down
        seed = derive_seed("downlink", self._plan.seed, server_round)
        return pack_frame(
            Frame(
                plan_digest=self.digest,
                server_round=server_round,
                client=0,
                codec=codec,
                count=tier.count,
                num_examples=0,
                loss=0.0,
                train_seconds=0.0,
                payload=encode_values(values[tier.where], codec, tier.groups, seed=seed),
            )
        )

    def _message(self, node: int, names: Sequence[str]) -> Message:
        plan = b"" if node in self.holders else self._plan_bytes
        clients = tuple(client_number(name) for name in names)
        tiers = sorted({self._tiers.index(name) for name in names})
        frames = b"".join(self._frame(tier) for tier in tiers)
        which = tuple(tiers.index(self._tiers.index(name)) for name in names)
        self.holders.add(node)
        payload = write_request(Request(clients, frames, plan, which if len(tiers) > 1 else ()))
        return Message(to_record(payload), dst_node_id=node, message_type="train")

    def _count(self) -> None:
        """What each client alone would receive: its frame, and the plan at its first time."""
        newcomers = [name for name in self.sampled if name not in self.told]
        self.told.update(newcomers)
        record = self._ledger.current
        record.clients, record.newcomers = len(self.sampled), len(newcomers)
        frames = self._solo_all(newcomers)
        plans = self._solo_all(newcomers, self._plan_bytes) - frames
        self._ledger.count_client(down=self._solo_all(self.sampled), plan=plans)

    def _solo_all(self, names: Sequence[str], plan: bytes = b"") -> int:
        """Bytes of requests to these clients, each alone with the frame of its tier."""
        per_tier = Counter(self._tiers.index(name) for name in names)
        return sum(
            count * solo_bytes(write_request(Request((1,), self._frame(tier), plan)), reply=False)
            for tier, count in per_tier.items()
        )


def wait_for_nodes(grid: Grid, limit_seconds: float) -> list[int]:
    """The nodes that are there now; if there are none, wait for one, but not for ever.

    Raises:
        RunError: None came in time.
    """
    limit = time.monotonic() + limit_seconds
    while not (nodes := sorted(grid.get_node_ids())):
        if time.monotonic() > limit:
            raise RunError(
                f"no node came within {limit_seconds:g} seconds (strategy.node-wait-seconds): "
                "start the nodes, or look at their logs."
            )
        time.sleep(0.5)
    return nodes
