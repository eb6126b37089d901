"""What a round sends: to each node its cohort, the global values, and the plan if it may lack it.

    ... -> codec -> plan -> client -> [strategy] -> ledger -> report

In:  the global values, the round, the nodes that are there.
Out: one train message a node.

Where clients differ in tier, a message carries a frame for each tier in its cohort, and each client
reads its own: what it reads does not depend on whom it shares a node with (law 6).

What goes along hangs on what a node holds already: the plan, and the reference of an earlier round.
The ledger counts each client alone, by what that client holds (`holders`).
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
    """Who is to be asked another time, since they could not answer as they were asked.

    Attributes:
        no_plan: Nodes that lack the plan.
        no_reference: Nodes that lack the reference that they were sent changes of.
        other_tier: Node -> its clients that it trains at another tier than it was asked for.
        no_residual: Node -> its clients whose last residual is lost.
    """

    no_plan: list[int] = field(default_factory=list)
    no_reference: list[int] = field(default_factory=list)
    other_tier: dict[int, list[str]] = field(default_factory=dict)
    no_residual: dict[int, list[str]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.no_plan or self.no_reference or self.other_tier or self.no_residual)


class Requests:
    """Makes the train messages of one round after another.

    Attributes:
        digest: By which messages name the plan.
        sampled: The clients of the round in hand, in alphabetical order.
        cohorts: Node -> its clients in this round.
        holders: Who holds what of earlier rounds.
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

    def of_round(
        self, server_round: int, values: np.ndarray, nodes: Sequence[int]
    ) -> Iterator[Message]:
        """Draw the round's clients and ask the nodes to train them.

        Each message is made when it is taken, since each holds the frame of values once more.

        Args:
            server_round: Counted from 1.
            values: Global values, float32, (num_values,).
            nodes: Ids of the nodes that are there.
        """
        self.sampled = self._population.sample(
            server_round, self._config.clients_per_round, self._plan.seed
        )
        self.cohorts = self._population.cohorts(self.sampled, nodes)
        self._downlink.begin(server_round, values)
        self._count()
        return (self._message(node, names) for node, names in self.cohorts.items())

    def again(self, asked: Retries) -> list[Message]:
        """The same once more, to those who could not answer as they were asked."""
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
        """Note that a client's update came."""
        self.holders.answered(node, name, self._tiers.index(name), server_round)

    def settle(self, server_round: int, names: Iterable[str]) -> None:
        """Note whose updates of a round have become part of the values."""
        self.holders.accepted.update(dict.fromkeys(names, server_round))

    def state(self) -> dict[str, np.ndarray]:
        """What a run that goes on later must have, to send the same as if it had not stopped."""
        return self.holders.state() | self._downlink.state() if self._remembers else {}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take what `state` gave.

        Raises:
            RunError: It is of another plan, or of other clients.
        """
        self.holders.load_state(state)
        self._downlink.load_state(state)

    def _message(self, node: int, names: Sequence[str]) -> Message:
        plan = b"" if node in self.holders.plan_nodes else self._plan_bytes
        tiers = sorted({self._tiers.index(name) for name in names})
        sent = [self._downlink.to(tier, self.holders.of_node(node, tier)) for tier in tiers]
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
        """What each client alone would receive: its frames, and the plan at its first time."""
        newcomers = [name for name in self.sampled if name not in self.holders.told]
        self.holders.told.update(newcomers)
        record = self._ledger.current
        record.clients = len(self.sampled)
        record.newcomers += len(newcomers)  # beside those of a roll call
        frames = self._bytes_if_alone(newcomers)
        plans = self._bytes_if_alone(newcomers, self._plan_bytes) - frames
        self._ledger.add_client_bytes(down=self._bytes_if_alone(self.sampled), plan=plans)

    def _count_again(self, asked: Retries, clients: Sequence[str]) -> None:
        """What is sent a second time to clients that are asked again.

        A node that lost plan or reference is a device where clients live on their nodes; elsewhere
        it is a worker that speaks for clients of many devices, and none of those lost anything.
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
        """Bytes of requests to these clients, each alone with what it lacks of its tier."""
        sizes: Counter[tuple[int, int, int]] = Counter()
        for name in names:
            tier, accepted = self._tiers.index(name), self.holders.accepted.get(name, 0)
            sizes[tier, self.holders.of_client(name, tier), accepted] += 1
        return sum(count * self._solo(*of, plan) for of, count in sizes.items())

    def _solo(self, tier: int, held: int, accepted: int, plan: bytes) -> int:
        sent = [self._downlink.to(tier, held)]
        request = self._request((SOME_CLIENT,), sent, plan, accepted=(accepted,))
        return single_client_bytes(request, reply=False)


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
