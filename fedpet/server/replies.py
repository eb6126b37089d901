"""Check a round's replies: accept frames, refuse the rest by name and with the reason (law 7).

In:  messages of nodes, each with a frame or a refusal for each client of a chunk.
Out: one checked update a client; every other client in the ledger with the reason.

Messages are taken one by one as they come. `updates` gives the updates in the order of the clients'
names, each as soon as all before it have come or are refused, so that neither memory nor the
result depends on their number, their order, or the number of nodes (law 6). A frame whose turn has
not come waits in its encoded form.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from flwr.app import Error, Message

from fedpet.codec import Seeds, VectorCodec
from fedpet.config import StrategyConfig
from fedpet.errors import FrameError, ReplyError
from fedpet.pet.tiers import Tier, Where
from fedpet.protocol.client_metric import ClientMetric
from fedpet.protocol.codec_seeds import uplink_seeds
from fedpet.protocol.flower_compat.flower_messages import client_app_raised
from fedpet.protocol.frame import Frame, Measured, Refusal, RefusalCode, unpack_frames
from fedpet.protocol.ledger import Ledger
from fedpet.protocol.plan import Plan
from fedpet.protocol.request import STYPE, from_record, single_client_bytes
from fedpet.server.client_pool import ClientPool, ConnectedClientPool
from fedpet.server.client_spread import checked_metric
from fedpet.server.client_weights import client_weights
from fedpet.server.reply_stream import SpooledPayloads
from fedpet.server.requests import Retry
from fedpet.server.schedule import Chunk
from fedpet.server.tier_assignment import TierAssignment

# Largest magnitude of an update's values and of the global values: their squares fit a float32, and
# after a few rounds of it every codec can still encode the values.
LARGEST_VALUE = 1e18
MAX_REPEATS = 3  # messages to a node for the same clients, whatever it lacked
# Ray's errors for a worker that is gone, as Flower quotes them.
WORKER_DIED = ("exceptions.ActorDiedError", "exceptions.ActorUnavailableError")
NOT_PULLED = 3  # Flower's code for a reply whose objects cannot be had
MOD_REFUSED = 6  # Flower's code for a mod that finds a message not to be as it must


@dataclass(frozen=True)
class Update:
    """Update of one client, as it was sent.

    Attributes:
        name: The client.
        node: Id of its node.
        payload: Its values less the global ones, encoded.
        coding: Decodes them.
        seeds: They were encoded by them.
        where: Their positions among the global values.
        weight: In a mean, see fedpet/server/client_weights.py.
        loss: Its mean training loss.
    """

    name: str
    node: int
    payload: bytes
    coding: VectorCodec
    seeds: Seeds
    where: Where
    weight: float
    loss: float

    def decode(self) -> np.ndarray:
        """Return the values less the global ones, float32, (values of its tier,), all finite.

        Raises:
            FrameError: The payload gives no such values.
        """
        change = self.coding.decode(self.payload, **self.seeds)
        if not (np.abs(change) <= LARGEST_VALUE).all():
            raise FrameError(
                f"an update's values are at most {LARGEST_VALUE:g} in magnitude, and no NaN: the "
                f"largest here is {np.abs(change).max():g}."
            )
        return change


class Replies:
    """Read the replies of one round.

    Args:
        server_round: Round that the frames must be of.
        plan: Plan that the frames must be of.
        digest: Digest of the plan.
        sampled: The round's clients, in alphabetical order.
        names: Number of a client in a frame -> its name.
        num_rows: Client -> its number of rows, the most it may weigh.
        tiers: Tier of each client, which decides its values.
        longest_payload: Bytes of the longest payload of any tier.
        config: Says how clients are weighed.
        ledger: Counts refusals, bytes and seconds.
        answered: Called for each accepted frame with node, client and round.
        population: Knows the nodes, and is told of one that cannot take part or has other rows.
    """

    def __init__(
        self,
        *,
        server_round: int,
        plan: Plan,
        digest: bytes,
        sampled: Sequence[str],
        names: Mapping[int, str],
        num_rows: Mapping[str, int],
        tiers: TierAssignment,
        longest_payload: int,
        config: StrategyConfig,
        ledger: Ledger,
        answered: Callable[[int, str, int], None] = lambda node, name, server_round: None,
        population: ClientPool | None = None,
    ) -> None:
        self._population = population or ClientPool(num_rows, {})
        self._answered = answered
        self._round = server_round
        self._plan = plan
        self._digest = digest
        self._sampled = sampled
        self._names = names
        self._num_rows = num_rows
        self._tiers = tiers
        self._longest = longest_payload
        self._config = config
        self._examples: dict[str, int] = {}  # of accepted clients
        self._weights: dict[str, float] = {}
        self.metrics: dict[str, ClientMetric] = {}  # of accepted clients that measured
        self._ledger = ledger
        self._settled: set[str] = set()  # clients that are accepted or refused
        self._turn = 0  # index of the first client whose update was not given out
        self._waiting: dict[str, tuple[int, Frame, tuple[int, int]]] = {}  # node, head, place
        self._payloads = SpooledPayloads()
        self._codings: dict[int, VectorCodec] = {}
        self._asked_again: dict[str, str] = {}  # client -> why
        self._train_seconds: defaultdict[int, float] = defaultdict(float)  # by node, all messages
        self._measuring: defaultdict[int, float] = defaultdict(float)  # seconds, by node

    def take(self, reply: Message, chunk: Chunk) -> Retry:
        """Accept or refuse what a message holds; return what of its chunk to ask for again.

        Of a node that says so, and names another tier of the plan, the book of tiers takes it down.
        """
        node, again = chunk.node, Retry()
        known = self._population.node_name(node)
        reason = f"node {known}: no reply came for this client, only for others."
        if reply.has_error():
            reason = f"node {known}: {error_reason(reply.error)}"
            if client_app_raised(reply.error):
                self._population.suspend(node)
                self._note(node, "suspended", reason)
        else:
            try:
                self._read(reply, chunk, again)
            except FrameError as error:
                reason = f"node {known}: {error}"
            # Flower's loop holds a round's messages until the next round's have come.
            reply.content.clear()
        again.names = [name for name in again.names if name not in self._settled]
        asked = {*again.names}
        missing = [n for n in chunk.names if n not in self._settled and n not in asked]
        if again.is_whole:
            again.names += missing
        else:
            for name in missing:
                self._refuse(name, reason, node)
        record = self._ledger.current
        record.train_seconds = max(record.train_seconds, self._train_seconds[node])
        longest = max(record.client_evaluation_seconds, self._measuring[node])
        record.client_evaluation_seconds = longest
        return again

    @property
    def num_answered(self) -> int:
        """Clients that are accepted or refused."""
        return len(self._settled)

    @property
    def num_accepted(self) -> int:
        """Clients whose update has come."""
        return len(self._examples)

    def refuse_absent(self, why: Callable[[str], tuple[str, int | None]]) -> None:
        """Refuse the clients without a reply.

        Args:
            why: Gives the reason why nothing came of a client, and its node.
        """
        for name in self._sampled:
            if name not in self._settled:
                reason, node = why(name)
                if name in self._asked_again:
                    reason = f"{self._asked_again[name]}; nothing usable came when it was asked "
                    reason += "again."
                self._refuse(name, reason, node)

    def weigh(self) -> None:
        """Weigh the accepted clients, of which no more come."""
        self._weights = client_weights(
            self._examples, rule=self._config.weights, max_share=self._config.max_share
        )

    def updates(self) -> Iterator[Update]:
        """Give the updates whose turn has come, in the order of the clients' names, each once.

        Where a client's share has a bound, `weigh` must come before: it depends on all.
        """
        while self._turn < len(self._sampled):
            name = self._sampled[self._turn]
            if name not in self._settled:
                break
            self._turn += 1
            if name in self._waiting:
                yield self._update(name)
        if not self._waiting:
            self._payloads.clear()

    def _update(self, name: str) -> Update:
        node, head, place = self._waiting.pop(name)
        return Update(
            name=name,
            node=node,
            payload=self._payloads.get(place),
            coding=self._coding(name),
            seeds=uplink_seeds(self._plan.seed, self._round, head.client),
            where=self._tiers.of(name).where,
            weight=self._weights.get(name, self._weight_alone(self._examples[name])),
            loss=head.loss,
        )

    def _weight_alone(self, num_examples: int) -> int:
        return 1 if self._config.weights == "uniform" else num_examples

    def _coding(self, name: str) -> VectorCodec:
        index = self._tiers.index(name)
        if index not in self._codings:
            tier: Tier = self._tiers.tiers[index]
            self._codings[index] = self._plan.uplink(tier.groups, tier.head_groups)
        return self._codings[index]

    def _read(self, reply: Message, chunk: Chunk, again: Retry) -> None:
        due, unfit = {*chunk.names}, set[int]()
        parts = unpack_frames(
            from_record(reply.content),
            max_frames=2 * len(due),
            max_payload_bytes=self._longest,
            views=True,
        )
        for part in parts:
            name = self._names.get(part.client, "")
            if name in due:  # its bytes count whether it is used or not
                up = single_client_bytes(part.num_bytes, reply=True)
                self._ledger.add_client_bytes(up=up)
            if isinstance(part, Refusal):
                if part.code == RefusalCode.NODE_UNFIT and chunk.node not in unfit:
                    self._population.suspend(chunk.node)
                    unfit.add(chunk.node)
                    self._note(chunk.node, "suspended", part.text)
                if part.code == RefusalCode.ROWS_CHANGED and not part.client:
                    self._population.register_again(chunk.node)
                    self._note(chunk.node, "rows changed")
                    continue
                if self._asks_again(part, name, due, chunk, again):
                    continue
            if name not in due:  # nobody speaks in another's name
                stranger = f"node {chunk.node}, client {part.client:016x}"
                known = self._population.node_name(chunk.node)
                reason = f"node {known} was not asked to train this client."
                self._ledger.refuse(stranger, reason, chunk.node)
            else:
                self._settle(chunk.node, part, name)

    def _note(self, node: int, event: str, details: str = "") -> None:
        if isinstance(self._population, ConnectedClientPool):
            self._ledger.note(self._population.node_name(node), event, details)

    def _asks_again(
        self, refusal: Refusal, name: str, due: set[str], chunk: Chunk, again: Retry
    ) -> bool:
        """Note a refusal whose code names what the server can send or do instead."""
        code, clients = refusal.code, [name]
        if code == RefusalCode.VALUES_MISSING and not chunk.brings_values:
            again.no_values = True
        elif chunk.repeats == MAX_REPEATS:
            return False
        elif code == RefusalCode.PLAN_MISSING:
            again.no_plan, clients = True, list(chunk.names)
        elif code == RefusalCode.REFERENCE_MISSING:
            again.no_reference, clients = True, list(chunk.names)
        elif name not in due or name in self._settled:
            return False
        elif code == RefusalCode.OTHER_TIER and self._tiers.move(name, refusal.density):
            again.other_tier.append(name)
            again.names.append(name)
        elif code == RefusalCode.RESIDUAL_MISSING:
            again.no_residual.append(name)
            again.names.append(name)
        else:
            return False
        self._asked_again.update(dict.fromkeys(clients, refusal.text))
        return True

    def _settle(self, node: int, part: Frame | Measured | Refusal, name: str) -> None:
        """Accept one frame and count its training seconds, or record the refusal."""
        try:
            self._check(node, part, name)
        except ReplyError as error:
            self._refuse(name, str(error), node)
            return
        assert isinstance(part, Frame)
        self._settled.add(name)
        self._examples[name] = min(part.num_examples, self._num_rows[name])
        if part.metric is not None:
            self.metrics[name] = self._checked_metric(part.metric, name, part.num_examples)
            self._measuring[node] += part.metric.seconds
        self._waiting[name] = node, replace(part, payload=b""), self._payloads.put(part.payload)
        self._train_seconds[node] += part.train_seconds
        self._ledger.current.replies += 1
        self._answered(node, name, self._round)
        self._population.took_part(node)

    def _refuse(self, name: str, reason: str, node: int | None) -> None:
        self._settled.add(name)
        self._ledger.refuse(name, reason, node)

    def _checked_metric(self, found: ClientMetric, name: str, num_examples: int) -> ClientMetric:
        grows = isinstance(self._population, ConnectedClientPool)
        rule = self._plan.evaluation if self._plan.measures else None
        rows = self._num_rows[name] - (0 if grows else num_examples)
        return checked_metric(found, self._plan.task.metric, rule, rows, grows=grows)

    def _check(self, node: int, part: Frame | Measured | Refusal, name: str) -> None:
        if name in self._settled:
            known = self._population.node_name(node)
            raise FrameError(f"node {known} sent a second frame for this client.")
        if isinstance(part, Refusal):
            raise ReplyError(part.text)
        if isinstance(part, Measured):
            raise FrameError("the client was asked to train, and sent a metric alone.")
        if part.plan_digest != self._digest:
            raise FrameError(
                f"the frame is of plan {part.plan_digest.hex()}, this run's is "
                f"{self._digest.hex()}."
            )
        if part.server_round != self._round:
            raise FrameError(f"the frame is of round {part.server_round}, this is {self._round}.")
        expected = self._tiers.of(name).count
        if part.codec != self._plan.codec.uplink or part.count != expected:
            raise FrameError(
                f"the plan asks this client for {expected} values by "
                f"{self._plan.codec.uplink!r}, the frame holds {part.count} by {part.codec!r}."
            )
        rows = self._num_rows[name]
        # A device's rows may have grown since it registered: it weighs what it registered.
        grows = isinstance(self._population, ConnectedClientPool)
        if not 1 <= part.num_examples <= (part.num_examples if grows else rows):
            raise FrameError(
                f"an update has at least 1 example and at most the client's {rows}, got "
                f"{part.num_examples}."
            )
        if not 0 <= part.loss < math.inf:
            raise FrameError(f"a training loss is finite and not negative, got {part.loss}.")
        if part.metric is not None:
            self._checked_metric(part.metric, name, part.num_examples)


def error_reason(error: Error) -> str:
    """Return an error's reason, with advice where a worker died or one of Flower's mods failed."""
    reason = error.reason or "an unnamed error."
    if any(died in reason for died in WORKER_DIED):
        return (
            "its worker died, and again each time that it was asked once more. If memory ran out, "
            "lower training.batch-size or run.workers."
        )
    if error.code == NOT_PULLED:
        return "its reply was not sent whole, or has more bytes than the plan's replies can have."
    if error.code == MOD_REFUSED or STYPE in reason:
        reason += (
            " Flower's mods for differential privacy clip and perturb arrays of floats, and a "
            "message here is one coded frame: take the mod off the ClientApp."
        )
    return reason
