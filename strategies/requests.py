"""What a round sends: to each node its cohort, the global values, and the plan if it may lack it.

    ... -> codec -> plan -> client -> [strategy] -> ledger -> report

In:  the global values, the round, the nodes that are there.
Out: one train message a node.

Who has been sent the plan is remembered here, twice: by node, which decides whether the plan goes
along, and by client, each counted alone, for the ledger.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

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
        groups: list[tuple[int, int]],
        population: Population,
        config: StrategyConfig,
        ledger: Ledger,
    ) -> None:
        self._plan = plan
        self._plan_bytes = plan.to_bytes()
        self._groups = groups
        self._population = population
        self._config = config
        self._ledger = ledger
        self._frame = b""
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
        self._frame = self._encode(server_round, values)
        self._count()
        return [self._message(node) for node in self.cohorts]

    def again(self, nodes: Iterable[int]) -> list[Message]:
        """The same to nodes that turned out to lack the plan, with the plan."""
        nodes = list(nodes)
        self.holders.difference_update(nodes)
        return [self._message(node) for node in nodes]

    def _encode(self, server_round: int, values: np.ndarray) -> bytes:
        codec = self._plan.codec.down
        seed = derive_seed("downlink", self._plan.seed, server_round)
        return pack_frame(
            Frame(
                plan_digest=self.digest,
                server_round=server_round,
                client=0,
                codec=codec,
                count=self._plan.num_values,
                num_examples=0,
                loss=0.0,
                train_seconds=0.0,
                payload=encode_values(values, codec, self._groups, seed=seed),
            )
        )

    def _message(self, node: int) -> Message:
        plan = b"" if node in self.holders else self._plan_bytes
        clients = tuple(client_number(name) for name in self.cohorts[node])
        payload = write_request(Request(clients, self._frame, plan))
        self.holders.add(node)
        return Message(to_record(payload), dst_node_id=node, message_type="train")

    def _count(self) -> None:
        """What each client alone would receive: the frame, and the plan at its first time."""
        frame = solo_bytes(write_request(Request((1,), self._frame)), reply=False)
        whole = solo_bytes(write_request(Request((1,), self._frame, self._plan_bytes)), reply=False)
        newcomers = [name for name in self.sampled if name not in self.told]
        self.told.update(newcomers)
        record = self._ledger.current
        record.clients, record.newcomers = len(self.sampled), len(newcomers)
        self._ledger.count_client(
            down=frame * len(self.sampled), plan=(whole - frame) * len(newcomers)
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
