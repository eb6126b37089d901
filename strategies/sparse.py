"""Federated averaging of the values that a plan names.

    ... -> codec -> plan -> client -> [strategy] -> ledger -> report

In:  the global values, held by Flower's round loop as one float32 array.
Out: the same after a round: each client's update decoded, checked, and folded into a mean.

A train message names the cohort that its node is to train, and carries the plan to a node that is
not known to hold it. Replies are frames of a few kilobytes; they are decoded one at a time in the
order of the clients' names, into a float64 sum, so that neither memory nor the result depends on
how many came, in which order, or from how many nodes (law 6).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedpet.codec import decode_values, encode_values
from fedpet.codec.frame import Frame, Refusal, pack_frame, unpack_frames
from fedpet.config import StrategyConfig
from fedpet.errors import FrameError, ReplyError, RunError
from fedpet.ledger import Ledger
from fedpet.messages import (
    PLAN_MISSING,
    Request,
    from_record,
    solo_bytes,
    to_record,
    write_request,
)
from fedpet.plan import Plan
from fedpet.population import Population
from fedpet.seeds import client_number, derive_seed

from .metered import Metered

VALUES = "values"
LOG = logging.getLogger("fedpet")


class _SparseRounds(FedAvg):
    """The rounds of `SparseFedAvg`, before they are metered."""

    def __init__(
        self,
        *,
        plan: Plan,
        groups: list[tuple[int, int]],
        population: Population,
        config: StrategyConfig,
        ledger: Ledger,
    ) -> None:
        super().__init__(min_available_nodes=1, min_train_nodes=1)
        self.plan = plan
        self.plan_bytes = plan.to_bytes()
        self.digest = Plan.digest(self.plan_bytes)
        self.groups = groups
        self.population = population
        self.config = config
        self.ledger = ledger
        self.names = population.by_number()
        self._holders: set[int] = set()  # nodes known to hold the plan
        self._told: set[str] = set()  # clients that have been sent the plan, each counted alone

    # -- down -------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message a node: its cohort, the global values, the plan if it may lack it."""
        sampled = self.population.sample(
            server_round, self.config.clients_per_round, self.plan.seed
        )
        self._grid = grid
        self._deadline = time.monotonic() + self.config.round_deadline_seconds
        self._values = values_of(arrays)
        self._sampled = sampled
        self._cohorts = self.population.cohorts(sampled, self._wait_for_nodes(grid))
        self._frame = pack_frame(
            Frame(
                plan_digest=self.digest,
                server_round=server_round,
                client=0,
                codec=self.plan.codec.down,
                count=self.plan.num_values,
                num_examples=0,
                loss=0.0,
                train_seconds=0.0,
                payload=encode_values(
                    self._values,
                    self.plan.codec.down,
                    self.groups,
                    seed=derive_seed("downlink", self.plan.seed, server_round),
                ),
            )
        )
        self.ledger.current.clients = len(sampled)
        self._count_downlink(sampled)
        return [self._message(node) for node in self._cohorts]

    def _message(self, node: int) -> Message:
        plan = b"" if node in self._holders else self.plan_bytes
        clients = tuple(client_number(name) for name in self._cohorts[node])
        payload = write_request(Request(clients, self._frame, plan))
        self._holders.add(node)
        return Message(to_record(payload), dst_node_id=node, message_type="train")

    def _count_downlink(self, sampled: list[str]) -> None:
        """What each client alone would receive: the frame, and the plan at its first time."""
        frame = solo_bytes(write_request(Request((1,), self._frame)), reply=False)
        newcomers = [name for name in sampled if name not in self._told]
        self._told.update(newcomers)
        self.ledger.current.newcomers = len(newcomers)
        whole = solo_bytes(write_request(Request((1,), self._frame, self.plan_bytes)), reply=False)
        self.ledger.count_client(down=frame * len(sampled), plan=(whole - frame) * len(newcomers))

    def _wait_for_nodes(self, grid: Grid) -> list[int]:
        """The nodes that are there now; if there are none, wait for one, but not for ever."""
        limit = time.monotonic() + self.config.node_wait_seconds
        while not (nodes := sorted(grid.get_node_ids())):
            if time.monotonic() > limit:
                raise RunError(
                    f"no node came within {self.config.node_wait_seconds:g} seconds "
                    "(strategy.node-wait-seconds): start the nodes, or look at their logs."
                )
            time.sleep(0.5)
        return nodes

    # -- up ---------------------------------------------------------------------------------

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Refuse what does not fit, average the rest if the quorum is met."""
        accepted: dict[str, Frame] = {}
        lacking = self._read(server_round, replies, accepted)
        if lacking:
            self._holders.difference_update(lacking)
            messages = [self._message(node) for node in lacking]
            left = max(self._deadline - time.monotonic(), 0.0)
            again = list(self._grid.send_and_receive(messages, timeout=left))
            for message in (*messages, *again):
                self.ledger.count_wire(message)
            self._read(server_round, again, accepted)
        for name in self._sampled:
            if name not in accepted and not self._was_refused(name):
                self.ledger.refuse(name, "no reply came before the round's deadline.")
        values, weight, loss = self._mean(accepted)
        record = self.ledger.current
        record.replies = len(accepted)
        record.loss = loss
        needed = max(self.config.min_replies, math.ceil(self.config.quorum * len(self._sampled)))
        for refused in record.refused:
            LOG.warning("round %s: %s: %s", server_round, refused["who"], refused["reason"])
        if record.replies < needed or not weight:
            LOG.warning(
                "round %s: %s usable replies, %s are needed; the values stay as they were.",
                server_round,
                record.replies,
                needed,
            )
            return None, None
        return to_arrays(values), MetricRecord({"num-examples": weight, "train-loss": loss or 0.0})

    def _read(
        self, server_round: int, replies: Iterable[Message], accepted: dict[str, Frame]
    ) -> list[int]:
        """Sort replies into accepted frames and refusals.

        Returns:
            Nodes that lack the plan, and are to be asked again with it.
        """
        lacking: list[int] = []
        for reply in sorted(replies, key=lambda message: message.metadata.src_node_id):
            node = reply.metadata.src_node_id
            if reply.has_error():
                self._refuse_cohort(node, reply.error.reason or "an unnamed error.", accepted)
                continue
            train_seconds = 0.0
            try:
                for part in self._parts(reply):
                    if isinstance(part, Refusal) and part.reason == PLAN_MISSING:
                        lacking.append(node)
                        break
                    train_seconds += self._settle(server_round, node, part, accepted)
            except FrameError as error:
                self._refuse_cohort(node, str(error), accepted)
            record = self.ledger.current
            record.train_seconds = max(record.train_seconds, train_seconds)
        return lacking

    def _parts(self, reply: Message) -> Iterator[Frame | Refusal]:
        cohort = self._cohorts.get(reply.metadata.src_node_id, [])
        # An incompressible codec needs at most 4 bytes a value; a frame adds its header.
        limit = 8 * self.plan.num_values + 4096
        return iter(
            unpack_frames(
                from_record(reply.content), max_frames=2 * len(cohort), max_payload_bytes=limit
            )
        )

    def _settle(
        self, server_round: int, node: int, part: Frame | Refusal, accepted: dict[str, Frame]
    ) -> float:
        """Accept one frame or note why not; gives the seconds its training took."""
        name = self.names.get(part.client, f"node {node}, client {part.client:016x}")
        try:
            self._check(server_round, node, part, name, accepted)
        except ReplyError as error:
            self.ledger.refuse(name, str(error))
            return 0.0
        assert isinstance(part, Frame)
        accepted[name] = part
        self.ledger.count_client(up=solo_bytes(pack_frame(part), reply=True))
        return part.train_seconds

    def _check(
        self,
        server_round: int,
        node: int,
        part: Frame | Refusal,
        name: str,
        accepted: Mapping[str, Frame],
    ) -> None:
        if isinstance(part, Refusal):
            raise ReplyError(part.reason)
        if name not in self._cohorts.get(node, []):
            raise FrameError(f"node {node} was not asked to train this client.")
        if name in accepted:
            raise FrameError(f"node {node} sent a second frame for this client.")
        if part.plan_digest != self.digest:
            raise FrameError(
                f"the frame is of plan {part.plan_digest.hex()}, this run's is {self.digest.hex()}."
            )
        if part.server_round != server_round:
            raise FrameError(f"the frame is of round {part.server_round}, this is {server_round}.")
        if part.codec != self.plan.codec.up or part.count != self.plan.num_values:
            raise FrameError(
                f"the plan asks for {self.plan.num_values} values by {self.plan.codec.up!r}, the "
                f"frame holds {part.count} by {part.codec!r}."
            )
        if part.num_examples < 1:
            raise FrameError(f"an update has at least 1 example, got {part.num_examples}.")
        if not math.isfinite(part.loss):
            raise FrameError(f"the training loss is {part.loss}.")

    def _mean(self, accepted: dict[str, Frame]) -> tuple[np.ndarray, int, float | None]:
        """Fold the accepted updates into the weighted mean, and drop those that do not decode.

        Returns:
            New global values, float32, (num_values,); the total weight; the mean loss.
        """
        total = np.zeros(self.plan.num_values, dtype=np.float64)
        weight, loss = 0, 0.0
        for name in sorted(accepted):
            frame = accepted[name]
            seed = derive_seed("client", self.plan.seed, frame.server_round, frame.client)
            try:
                update = decode_values(
                    frame.payload, frame.codec, self.groups, seed=derive_seed("encode", seed)
                )
                if not np.isfinite(update).all():
                    raise FrameError("the update holds NaN or infinity.")
            except FrameError as error:
                self.ledger.refuse(name, str(error))
                del accepted[name]
                continue
            total += frame.num_examples * update.astype(np.float64)
            weight += frame.num_examples
            loss += frame.num_examples * frame.loss
        if not weight:
            return self._values, 0, None
        mean = self._values.astype(np.float64) + total / weight
        return mean.astype(np.float32), weight, loss / weight

    def _refuse_cohort(self, node: int, reason: str, accepted: Mapping[str, Frame]) -> None:
        """Refuse all of a node's clients whose frames had not been read yet."""
        for name in self._cohorts.get(node, []):
            if name not in accepted and not self._was_refused(name):
                self.ledger.refuse(name, f"node {node}: {reason}")

    def _was_refused(self, name: str) -> bool:
        return any(refused["who"] == name for refused in self.ledger.current.refused)

    # -- evaluation is the server's ---------------------------------------------------------

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """No message: an evaluation by the clients would send the values a second time."""
        return []

    def summary(self) -> None:
        """Say nothing: the run's own progress does."""


class SparseFedAvg(Metered, _SparseRounds):
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


def to_arrays(values: np.ndarray) -> ArrayRecord:
    """The global values as the ArrayRecord that Flower's loop hands on."""
    return ArrayRecord({VALUES: Array(np.ascontiguousarray(values, dtype=np.float32))})


def values_of(arrays: ArrayRecord) -> np.ndarray:
    """The global values of `to_arrays`. float32, (num_values,)."""
    return arrays[VALUES].numpy()
