"""Make a round's train messages: clients, the global values, the plan for a node that lacks it.

In:  the global values, the round, the online nodes; replies, which ask for more.
Out: train messages, each for a chunk of clients (fedpet/server/schedule.py).

The first message to a node in a round carries the values, and later ones name them. Where clients
differ in tier, it has a frame for each tier of the node's clients, and each client reads its own:
its bytes do not depend on the clients that share its node (law 6).

A node that has the plan or a reference of an earlier round is sent less. The ledger counts each
client alone, by its own records (`holders`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from flwr.app import Message, Metadata
from flwr.serverapp import Grid
from msgspec import structs

from fedpet.config import StrategyConfig
from fedpet.errors import RunError
from fedpet.protocol.ledger import Ledger
from fedpet.protocol.plan import Plan
from fedpet.protocol.request import (
    SOME_CLIENT,
    HeldValues,
    Request,
    single_client_bytes,
    to_record,
    write_request,
)
from fedpet.protocol.wire_struct import encode_struct
from fedpet.server.client_pool import ClientPool
from fedpet.server.client_records import ClientRecords
from fedpet.server.downlink import Sent, downlink_of
from fedpet.server.pace import Pace
from fedpet.server.schedule import IN_FLIGHT, Chunk, Schedule, chunk_size
from fedpet.server.tier_assignment import TierAssignment
from fedpet.utils.seeds import client_id64


@dataclass
class Retry:
    """List what of a chunk needs another message, since the first could not be answered.

    Attributes:
        names: Clients to ask for once more.
        no_plan: The node lacks the plan.
        no_reference: It lacks the reference that it was sent changes of.
        no_values: It lacks the values that the message named.
        other_tier: Clients that it trains at another tier than it was sent.
        no_residual: Clients whose last residual is lost.
    """

    names: list[str] = field(default_factory=list)
    no_plan: bool = False
    no_reference: bool = False
    no_values: bool = False
    other_tier: list[str] = field(default_factory=list)
    no_residual: list[str] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        """Tell if the node could begin with none of the chunk."""
        return self.no_plan or self.no_reference or self.no_values


@dataclass
class _Given:
    """The values that a node was sent in this round: the tiers, and the name of all together."""

    tiers: list[int]
    name: HeldValues | None = None  # None is sent to a node that forgets


class Requests:
    """Make the train messages of one round after another.

    Attributes:
        plan_bytes: The plan, as it is sent.
        digest: Digest that names the plan in messages.
        sampled: Clients of the current round, in alphabetical order.
        homes: Client -> node that was asked to train it in this round.
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
        self.plan_bytes = plan.to_bytes()
        self._tiers = tiers
        self._population = population
        self._config = config
        self._ledger = ledger
        self.digest = Plan.digest(self.plan_bytes)
        self._downlink = downlink_of(plan, self.digest, tiers.tiers)
        self._remembers = plan.is_delta_downlink or plan.codec.error_feedback
        tierwise = (plan.uplink(tier.groups, tier.head_groups) for tier in tiers.tiers)
        self.longest_payload = max(coding.max_payload_bytes for coding in tierwise)
        self.sampled: list[str] = []
        self.homes: dict[str, int] = {}
        self.holders = ClientRecords(population.num_rows)

    def first_requests(
        self, server_round: int, values: np.ndarray, nodes: Sequence[int]
    ) -> Iterator[Message]:
        """Draw the round's clients and make the first requests of each node.

        Each message is made when it is iterated over, since it may hold the frame of values anew. A
        node that is sent the plan has stored it before it is sent a second message.

        Args:
            server_round: Counted from 1.
            values: Global values, float32, (num_values,).
            nodes: Ids of the online nodes.
        """
        self.sampled = self._population.sample(
            server_round, Pace.num_drawn(self._config), self._plan.seed
        )
        self._round = server_round
        self._schedule = Schedule(
            self.sampled, nodes, self._population, chunk_size(self.longest_payload)
        )
        self.homes = {}
        self._given: dict[int, _Given] = {}
        self._sent: list[tuple[Metadata, Chunk]] = []  # not yet known by their messages' ids
        self._out: dict[str, Chunk] = {}
        self._num_out: Counter[int] = Counter()
        self._downlink.begin(server_round, values)
        self._count()
        return self._first(set(self.holders.plan_nodes))

    def _first(self, ready: set[int]) -> Iterator[Message]:
        for turn in range(IN_FLIGHT):
            for node in self._schedule.nodes:
                if not turn or node in ready:
                    yield from self._next(node)

    def chunk_of(self, reply: Message) -> Chunk:
        """Return what a reply answers, which is no longer awaited."""
        if (number := reply.metadata.reply_to_message_id) not in self._out:
            self._out |= {metadata.message_id: chunk for metadata, chunk in self._sent}
            self._sent.clear()
        chunk = self._out.pop(number)
        self._num_out[chunk.node] -= 1
        return chunk

    def further_requests(self, chunk: Chunk, asked: Retry) -> Iterator[Message]:
        """Make the requests that follow a reply: what it asks for again, and the node's next."""
        if asked.names:
            self._prepare_retry(chunk.node, asked)
            repeats = chunk.repeats + (not asked.no_values)
            yield self._message(Chunk(chunk.node, sorted(asked.names), repeats=repeats))
        while self._num_out[chunk.node] < IN_FLIGHT:
            count = self._num_out[chunk.node]
            yield from self._next(chunk.node)
            if self._num_out[chunk.node] == count:
                return

    def why_absent(self, name: str) -> tuple[str, int | None]:
        """Return why nothing came of a client, and its node."""
        if (node := self.homes.get(name)) is not None:
            known = self._population.node_name(node)
            return f"node {known}: no reply came before the round's deadline.", node
        if name in self._schedule:
            return "the round's deadline came before its turn.", None
        return "the node that it lives on is not connected.", None

    def _next(self, node: int) -> Iterator[Message]:
        if names := self._schedule.next(node):
            yield self._message(Chunk(node, names))

    def _prepare_retry(self, node: int, asked: Retry) -> None:
        if asked.no_plan:
            self.holders.forget_plan(node)
        if asked.no_reference:
            self.holders.forget_reference(node)
        if asked.no_values:
            self._given[node].name = None
        for name in asked.no_residual:
            self.holders.accepted.pop(name, None)
        for name in asked.other_tier:  # a residual of another tier is of other values
            self.holders.keep_tier(name, self._tiers.index(name))
        self._count_again(asked)

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

    def _message(self, chunk: Chunk) -> Message:
        node, names = chunk.node, chunk.names
        tiers, given = [self._tiers.index(name) for name in names], self._given.get(node)
        held = given.name if given and not chunk.repeats and {*tiers} <= {*given.tiers} else None
        sent: list[Sent] = []
        if given and held:
            among = given.tiers
        else:
            alike = given or len(self._tiers.tiers) == 1
            later = () if alike else self._schedule.clients_of(node)
            among = sorted({*tiers, *map(self._tiers.index, later)})
            known = self.holders.reference_of_node
            sent = [self._downlink.to(tier, known(node, tier)) for tier in among]
        request = self._request(
            tuple(client_id64(name) for name in names),
            sent,
            b"" if node in self.holders.plan_nodes else self.plan_bytes,
            which=tuple(among.index(tier) for tier in tiers) if len(among) > 1 else (),
            accepted=tuple(self.holders.accepted.get(name, 0) for name in names),
        )
        if held:
            request = structs.replace(request, frame=encode_struct(held))
        elif not given:
            self._given[node] = _Given(among, request.name_values(self.digest, self._round))
        self.holders.plan_nodes.add(node)
        message = Message(to_record(write_request(request)), dst_node_id=node, message_type="train")
        self._sent.append((message.metadata, replace(chunk, brings_values=held is None)))
        self._num_out[node] += 1
        self.homes.update(dict.fromkeys(names, node))
        return message

    def _request(
        self,
        clients: tuple[int, ...],
        sent: Sequence[Sent],
        plan: bytes,
        *,
        which: tuple[int, ...] = (),
        accepted: tuple[int, ...],
    ) -> Request:
        return Request(
            clients,
            b"".join(part.frames for part in sent),
            plan,
            which,
            self.holders.run if self._remembers else 0,
            tuple(part.path for part in sent if part.path is not None),
            accepted if self._plan.codec.error_feedback else (),
        )

    def _count(self) -> None:
        """Count what each client alone would receive: its frames, and at first the plan."""
        newcomers = [name for name in self.sampled if name not in self.holders.clients_with_plan]
        self.holders.clients_with_plan.update(newcomers)
        record = self._ledger.current
        record.clients = len(self.sampled)
        record.newcomers += len(newcomers)  # beside those that a registry has counted
        frames = self._bytes_if_alone(newcomers)
        plans = self._bytes_if_alone(newcomers, self.plan_bytes) - frames
        self._ledger.add_client_bytes(down=self._bytes_if_alone(self.sampled), plan=plans)

    def _count_again(self, asked: Retry) -> None:
        """Count what clients are sent a second time.

        A node that lost plan or reference is a device where clients live on their nodes. Elsewhere
        it is a simulation's worker, which stands for many devices, and none of those lost it. No
        device alone is sent values by name.
        """
        clients = (*asked.other_tier, *asked.no_residual)
        self._ledger.add_client_bytes(down=self._bytes_if_alone(clients))
        if self._population.homes and (asked.no_plan or asked.no_reference):
            self.holders.forget_clients(asked.names)
            down = self._bytes_if_alone(asked.names)
            plan = self._bytes_if_alone(asked.names, self.plan_bytes) if asked.no_plan else down
            self._ledger.add_client_bytes(down=down, plan=plan - down)

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
        return single_client_bytes(len(write_request(request)), reply=False)


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
