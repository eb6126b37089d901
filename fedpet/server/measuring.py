"""Have clients measure the global values, outside of training: those that never train, and others.

In:  the values after a round, and the clients to measure them.
Out: each client's metric, checked; who gave none is in the ledger with the reason.

The values go down once, coded in full by the plan's codec and in the round's own seed, as the next
round would send them; only the metric comes up. The bytes stand in a line of their own kind.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from flwr.app import Message, Metadata
from flwr.serverapp import Grid

from fedpet.errors import FrameError, ReplyError
from fedpet.pet.tiers import Tier
from fedpet.protocol.client_metric import ClientMetric
from fedpet.protocol.frame import Measured, Refusal, RefusalCode, unpack_frames
from fedpet.protocol.ledger import EVALUATION, Ledger
from fedpet.protocol.plan import Plan
from fedpet.protocol.request import (
    SOME_CLIENT,
    EvaluationRequest,
    from_record,
    single_client_bytes,
    to_record,
    write_request,
)
from fedpet.server.client_pool import ClientPool, ConnectedClientPool
from fedpet.server.client_records import ClientRecords
from fedpet.server.client_spread import checked_metric
from fedpet.server.downlink import Values
from fedpet.server.replies import MAX_REPEATS, error_reason
from fedpet.server.reply_stream import StreamingGrid
from fedpet.server.requests import wait_for_nodes
from fedpet.server.schedule import MOST, Chunk, Schedule
from fedpet.utils.seeds import client_id64

__all__ = ["Measuring"]


class Measuring:
    """Send values to clients that measure them.

    Args:
        plan: Says what is held out, and the codec.
        plan_bytes: Its bytes, for nodes that lack it.
        tiers: The last has all values, which every client measures.
        population: Knows the clients and their nodes.
        holders: Records of who has the plan.
        ledger: Takes a line of the kind "evaluation".
        node_wait_seconds: For the first node.
        deadline_seconds: Answers that come later are refused.
    """

    def __init__(
        self,
        *,
        plan: Plan,
        plan_bytes: bytes,
        tiers: Sequence[Tier],
        population: ClientPool,
        holders: ClientRecords,
        ledger: Ledger,
        node_wait_seconds: float,
        deadline_seconds: float,
    ) -> None:
        self._plan, self._plan_bytes = plan, plan_bytes
        self._digest = Plan.digest(plan_bytes)
        self._tiers = tiers
        self._population, self._holders, self._ledger = population, holders, ledger
        self._node_wait, self._deadline = node_wait_seconds, deadline_seconds

    def run(
        self, grid: Grid, server_round: int, values: np.ndarray, clients: Iterable[str]
    ) -> dict[str, ClientMetric]:
        """Open a line of the ledger, and collect the clients' metrics.

        Args:
            grid: Reaches the nodes.
            server_round: The round that the values came of; 0 before the first.
            values: float32, (num_values,).
            clients: Their names.

        Returns:
            By client, in alphabetical order, without those that gave none.
        """
        started = time.perf_counter()
        record = self._ledger.begin(server_round, EVALUATION)
        self._round = server_round + 1
        coded = Values(self._plan, self._digest, self._tiers)
        coded.begin(self._round, values)
        self._frames = coded.to(len(self._tiers) - 1, 0).frames
        names = sorted(clients)
        nodes = wait_for_nodes(grid, self._node_wait)
        self._schedule = Schedule(names, nodes, self._population, MOST)
        self._due = set(names)
        self._found: dict[str, ClientMetric] = {}
        self._seconds: defaultdict[int, float] = defaultdict(float)
        self._out: dict[str, Chunk] = {}
        self._sent: list[tuple[Metadata, Chunk]] = []
        self._count(names)
        streaming = StreamingGrid(grid, self._take)
        streaming.send_and_receive(self._first(), timeout=self._deadline)
        for name in sorted(self._due):
            self._ledger.refuse(name, "it gave no evaluation before the deadline, or is offline.")
        record.replies = len(self._found)
        record.client_evaluation_seconds = max(self._seconds.values(), default=0.0)
        record.round_seconds = time.perf_counter() - started
        return dict(sorted(self._found.items()))

    # -- messages ---------------------------------------------------------------------------

    def _first(self) -> Iterator[Message]:
        for node in self._schedule.nodes:
            yield from self._next(node)

    def _next(self, node: int) -> Iterator[Message]:
        if names := self._schedule.next(node):
            yield self._message(Chunk(node, names))

    def _message(self, chunk: Chunk) -> Message:
        plan = b"" if chunk.node in self._holders.plan_nodes else self._plan_bytes
        self._holders.plan_nodes.add(chunk.node)
        clients = tuple(client_id64(name) for name in chunk.names)
        record = to_record(write_request(EvaluationRequest(clients, self._frames, plan)))
        message = Message(record, dst_node_id=chunk.node, message_type="evaluate")
        self._sent.append((message.metadata, chunk))
        self._ledger.add_message(message)
        return message

    def _chunk_of(self, reply: Message) -> Chunk:
        """Return what a reply answers: a message has its id once it is sent."""
        self._out |= {metadata.message_id: chunk for metadata, chunk in self._sent}
        self._sent.clear()
        return self._out.pop(reply.metadata.reply_to_message_id)

    # -- answers ----------------------------------------------------------------------------

    def _take(self, reply: Message) -> Iterator[Message]:
        self._ledger.add_message(reply)
        chunk = self._chunk_of(reply)
        missing = "no evaluation came for this client, only for others."
        plan_missing = False
        if reply.has_error():
            missing = error_reason(reply.error)
        else:
            try:
                plan_missing = self._read(reply, chunk)
            except FrameError as error:
                missing = str(error)
        left = [name for name in chunk.names if name in self._due]
        if plan_missing and left and chunk.repeats < MAX_REPEATS:
            self._holders.forget_plan(chunk.node)
            yield self._message(Chunk(chunk.node, left, repeats=chunk.repeats + 1))
            return
        for name in left:
            self._refuse(name, missing, chunk.node)
        yield from self._next(chunk.node)

    def _read(self, reply: Message, chunk: Chunk) -> bool:
        """Read the answers of a message; tell if the node lacks the plan."""
        names, plan_missing = self._population.by_number(), False
        parts = unpack_frames(
            from_record(reply.content), max_frames=2 * len(chunk.names), max_payload_bytes=0
        )
        asked = set(chunk.names)
        for part in parts:
            name = names.get(part.client, "")
            if name not in asked:
                who = f"node {chunk.node}, client {part.client:016x}"
                self._ledger.refuse(who, "this client was not asked to measure.", chunk.node)
                continue
            self._ledger.add_client_bytes(up=single_client_bytes(part.num_bytes, reply=True))
            if isinstance(part, Refusal) and part.code == RefusalCode.PLAN_MISSING:
                plan_missing = True
            elif name in self._due:
                try:
                    metric = self._checked(part, name)
                except ReplyError as error:
                    self._refuse(name, str(error), chunk.node)
                    continue
                self._due.discard(name)
                self._found[name] = metric
                self._seconds[chunk.node] += metric.seconds
        return plan_missing

    def _checked(self, part: object, name: str) -> ClientMetric:
        if isinstance(part, Refusal):
            raise ReplyError(part.text)
        if not isinstance(part, Measured):
            raise FrameError("the client was asked for a metric alone, and sent values.")
        if (part.plan_digest, part.server_round) != (self._digest, self._round):
            raise FrameError("the evaluation is of another plan or another round.")
        return checked_metric(
            part.metric,
            self._plan.task.metric,
            self._plan.evaluation,
            self._population.num_rows[name],
            grows=isinstance(self._population, ConnectedClientPool),
            alone=True,
        )

    def _refuse(self, name: str, reason: str, node: int) -> None:
        self._due.discard(name)
        self._ledger.refuse(name, f"node {self._population.node_name(node)}: {reason}", node)

    # -- bytes ------------------------------------------------------------------------------

    def _count(self, names: Sequence[str]) -> None:
        """Count what each client alone receives, and at first the plan."""
        newcomers = [name for name in names if name not in self._holders.clients_with_plan]
        self._holders.clients_with_plan.update(newcomers)
        record = self._ledger.current
        record.clients = len(names)
        record.newcomers += len(newcomers)
        alone = self._bytes_if_alone(b"")
        plan = self._bytes_if_alone(self._plan_bytes) - alone
        self._ledger.add_client_bytes(down=alone * len(names), plan=plan * len(newcomers))

    def _bytes_if_alone(self, plan: bytes) -> int:
        request = EvaluationRequest((SOME_CLIENT,), self._frames, plan)
        return single_client_bytes(len(write_request(request)), reply=False)
