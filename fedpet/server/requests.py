"""Make a round's train messages: a cohort, the global values, the plan for a node that lacks it.

In:  the global values, the round, the online nodes.
Out: one train message a node.

Where clients differ in tier, a message carries a frame for each tier in its cohort, and each client
reads its own: its bytes do not depend on the clients that share its node (law 6).

A node that has the plan or a reference of an earlier round is sent less. The ledger counts each
client alone, by its own records (`holders`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid

from fedpet.config import StrategyConfig
from fedpet.errors import RunError
from fedpet.protocol.ledger import Ledger
from fedpet.protocol.plan import Plan
from fedpet.protocol.request import (
    SOME_CLIENT,
    Request,
    single_client_bytes,
    to_record,
    write_request,
)
from fedpet.server.client_pool import ClientPool
from fedpet.server.client_records import ClientRecords
from fedpet.server.downlink import Sent, downlink_of
from fedpet.server.tier_assignment import TierAssignment
from fedpet.utils.seeds import client_id64


@dataclass
class Retries:
    """List who needs another request, since the first one could not be answered.

    Attributes:
        no_plan: Nodes that lack the plan.
        no_reference: Nodes that lack the reference that they were sent changes of.
        other_tier: Node -> its clients that it trains at another tier than it was sent.
        no_residual: Node -> its clients whose last residual is lost.
    """

    no_plan: list[int] = field(default_factory=list)
    no_reference: list[int] = field(default_factory=list)
    other_tier: dict[int, list[str]] = field(default_factory=dict)
    no_residual: dict[int, list[str]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.no_plan or self.no_reference or self.other_tier or self.no_residual)


class Requests:
    """Make the train messages of one round after another.

    Attributes:
        digest: Digest that names the plan in messages.
        sampled: Clients of the current round, in alphabetical order.
        cohorts: Node -> its clients in this round.
        holders: Records of who has the plan and which reference.
    """

    def __init__(
        self,
        *,
        plan: Plan,
        tiers: TierAssignment,
        population: ClientPool,
        config: StrategyConfig,
        ledger: Ledger,
    ) -> None:
        self._plan = plan
        self._plan_bytes = plan.to_bytes()
        self._tiers = tiers
        self._population = population
        self._config = config
        self._ledger = ledger
        self.digest = Plan.digest(self._plan_bytes)
        self._downlink = downlink_of(plan, self.digest, tiers.tiers)
        self._remembers = plan.is_delta_downlink or plan.codec.error_feedback
        self.sampled: list[str] = []
        self.cohorts: dict[int, list[str]] = {}
        self.holders = ClientRecords(population.num_rows)

    def first_requests(
        self, server_round: int, values: np.ndarray, nodes: Sequence[int]
    ) -> Iterator[Message]:
        """Draw the round's clients and make one request a node.

        Each message is made when it is iterated over, since each holds the frame of values anew.

        Args:
            server_round: Counted from 1.
            values: Global values, float32, (num_values,).
            nodes: Ids of the online nodes.
        """
        self.sampled = self._population.sample(
            server_round, self._config.clients_per_round, self._plan.seed
        )
        self.cohorts = self._population.cohorts(self.sampled, nodes)
        self._downlink.begin(server_round, values)
        self._count()
        return (self._message(node, names) for node, names in self.cohorts.items())

    def retry_requests(self, asked: Retries) -> list[Message]:
        """Make the requests that take the place of those that could not be answered."""
        for node in asked.no_plan:
            self.holders.forget_plan(node)
        for node in asked.no_reference:
            self.holders.forget_reference(node)
        others = [name for names in asked.other_tier.values() for name in names]
        lost = [name for names in asked.no_residual.values() for name in names]
        for name in lost:
            self.holders.accepted.pop(name, None)
        for name in others:  # a residual of another tier is of other values
            self.holders.keep_tier(name, self._tiers.index(name))
        self._count_again(asked, (*others, *lost))
        whole = {node: self.cohorts[node] for node in (*asked.no_plan, *asked.no_reference)}
        for part in (asked.other_tier, asked.no_residual):
            for node, names in part.items():
                if node not in whole:
                    whole[node] = []
                whole[node] = sorted({*whole[node], *names})
        return [self._message(node, names) for node, names in whole.items()]

    def answered(self, node: int, name: str, server_round: int) -> None:
        """Record that a client's update came."""
        self.holders.answered(node, name, self._tiers.index(name), server_round)

    def settle(self, server_round: int, names: Iterable[str]) -> None:
        """Record the clients whose updates of a round have become part of the values."""
        self.holders.accepted.update(dict.fromkeys(names, server_round))

    def state(self) -> dict[str, np.ndarray]:
        """Return what a resumed run needs to send the same bytes as one that never stopped."""
        return self.holders.state() | self._downlink.state() if self._remembers else {}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Go back to a `state`.

        Raises:
            RunError: It is of another plan, or of other clients.
        """
        self.holders.load_state(state)
        self._downlink.load_state(state)

    def _message(self, node: int, names: Sequence[str]) -> Message:
        plan = b"" if node in self.holders.plan_nodes else self._plan_bytes
        tiers = sorted({self._tiers.index(name) for name in names})
        held = self.holders.reference_of_node
        sent = [self._downlink.to(tier, held(node, tier)) for tier in tiers]
        which = tuple(tiers.index(self._tiers.index(name)) for name in names)
        self.holders.plan_nodes.add(node)
        payload = self._request(
            tuple(client_id64(name) for name in names),
            sent,
            plan,
            which=which if len(tiers) > 1 else (),
            accepted=tuple(self.holders.accepted.get(name, 0) for name in names),
        )
        return Message(to_record(payload), dst_node_id=node, message_type="train")

    def _request(
        self,
        clients: tuple[int, ...],
        sent: Sequence[Sent],
        plan: bytes,
        *,
        which: tuple[int, ...] = (),
        accepted: tuple[int, ...],
    ) -> bytes:
        return write_request(
            Request(
                clients,
                b"".join(part.frames for part in sent),
                plan,
                which,
                self.holders.run if self._remembers else 0,
                tuple(part.path for part in sent if part.path is not None),
                accepted if self._plan.codec.error_feedback else (),
            )
        )

    def _count(self) -> None:
        """Count what each client alone would receive: its frames, and at first the plan."""
        newcomers = [name for name in self.sampled if name not in self.holders.clients_with_plan]
        self.holders.clients_with_plan.update(newcomers)
        record = self._ledger.current
        record.clients = len(self.sampled)
        record.newcomers += len(newcomers)  # beside those that a registry has counted
        frames = self._bytes_if_alone(newcomers)
        plans = self._bytes_if_alone(newcomers, self._plan_bytes) - frames
        self._ledger.add_client_bytes(down=self._bytes_if_alone(self.sampled), plan=plans)

    def _count_again(self, asked: Retries, clients: Sequence[str]) -> None:
        """Count what clients are sent a second time.

        A node that lost plan or reference is a device where clients live on their nodes. Elsewhere
        it is a simulation's worker, which stands for many devices, and none of those lost it.
        """
        self._ledger.add_client_bytes(down=self._bytes_if_alone(clients))
        if not self._population.homes:
            return
        for node in (*asked.no_plan, *asked.no_reference):
            names = self.cohorts[node]
            self.holders.forget_clients(names)
            frames = self._bytes_if_alone(names)
            with_plan = (
                self._bytes_if_alone(names, self._plan_bytes) if node in asked.no_plan else frames
            )
            self._ledger.add_client_bytes(down=frames, plan=with_plan - frames)

    def _bytes_if_alone(self, names: Sequence[str], plan: bytes = b"") -> int:
        """Return the bytes of requests to these clients, each alone with what it lacks."""
        sizes: Counter[tuple[int, int, int]] = Counter()
        for name in names:
            tier, accepted = self._tiers.index(name), self.holders.accepted.get(name, 0)
            sizes[tier, self.holders.reference_of_client(name, tier), accepted] += 1
        return sum(count * self._solo(*of, plan) for of, count in sizes.items())

    def _solo(self, tier: int, held: int, accepted: int, plan: bytes) -> int:
        sent = [self._downlink.to(tier, held)]
        request = self._request((SOME_CLIENT,), sent, plan, accepted=(accepted,))
        return single_client_bytes(request, reply=False)


def wait_for_nodes(grid: Grid, limit_seconds: float) -> list[int]:
    """Return the online nodes; where there are none, wait for one.

    Raises:
        RunError: No node connected within `limit_seconds`.
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
