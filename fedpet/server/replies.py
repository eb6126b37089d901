"""Check a round's replies: accept frames, refuse the rest by name and with the reason (law 7).

In:  messages of nodes, each with a frame or a refusal for each client of its cohort.
Out: one checked update a client; every other client in the ledger with the reason.

Messages are taken one by one as they come. Frames wait in their encoded form: `updates` decodes
them one at a time, in the order of the clients' names, so that neither memory nor the result
depends on their number, their order, or the number of nodes (law 6).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from flwr.app import Error, Message

from fedpet.codec import VectorCodec
from fedpet.errors import FrameError, ReplyError
from fedpet.pet.tiers import Where
from fedpet.protocol.frame import Frame, Refusal, RefusalCode, unpack_frames
from fedpet.protocol.ledger import Ledger
from fedpet.protocol.plan import Plan
from fedpet.protocol.request import STYPE, from_record, single_client_bytes
from fedpet.server.reply_stream import SpooledPayloads
from fedpet.server.requests import Retries
from fedpet.server.tier_assignment import TierAssignment
from fedpet.utils.seeds import derive_seed

# Largest magnitude of an update's values and of the global values: their squares fit a float32, and
# after a few rounds of it every codec can still encode the values.
LARGEST_VALUE = 1e18
# Ray's errors for a worker that is gone, as Flower quotes them.
WORKER_DIED = ("exceptions.ActorDiedError", "exceptions.ActorUnavailableError")
MOD_REFUSED = 6  # Flower's code for a mod that finds a message not to be as it must


@dataclass(frozen=True)
class Update:
    """Update of one client.

    Attributes:
        name: The client.
        change: Its values less the global ones, float32, (values of its tier,), all finite.
        where: Their positions among the global values.
        num_examples: Rows it trained on; its weight in a mean.
        loss: Its mean training loss.
    """

    name: str
    change: np.ndarray
    where: Where
    num_examples: int
    loss: float


class Replies:
    """Read the replies of one round.

    Args:
        server_round: Round that the frames must be of.
        plan: Plan that the frames must be of.
        digest: Digest of the plan.
        cohorts: Node -> clients it was sent to train.
        names: Number of a client in a frame -> its name.
        num_rows: Client -> its number of rows, the most it may weigh.
        tiers: Tier of each client, which decides its values.
        ledger: Counts refusals, bytes and seconds.
        answered: Called for each accepted frame with node, client and round.
    """

    def __init__(
        self,
        *,
        server_round: int,
        plan: Plan,
        digest: bytes,
        cohorts: Mapping[int, Sequence[str]],
        names: Mapping[int, str],
        num_rows: Mapping[str, int],
        tiers: TierAssignment,
        ledger: Ledger,
        answered: Callable[[int, str, int], None] = lambda node, name, server_round: None,
    ) -> None:
        self._answered = answered
        self._round = server_round
        self._plan = plan
        self._digest = digest
        self._cohorts = cohorts
        self._names = names
        self._num_rows = num_rows
        self._tiers = tiers
        self._ledger = ledger
        codings = (plan.uplink(tier.groups, tier.head_groups) for tier in tiers.tiers)
        self._longest = max(coding.max_payload_bytes for coding in codings)
        self._accepted: dict[str, tuple[Frame, tuple[int, int]]] = {}  # without payload; where
        self._payloads = SpooledPayloads()
        self._again = Retries()
        self._asked_again: dict[str, str] = {}  # client -> why
        self._train_seconds: defaultdict[int, float] = defaultdict(float)  # by node, all messages

    def take(self, reply: Message) -> None:
        """Accept or refuse what a message holds, but for those to be asked again.

        Of a node that says so, and names another tier of the plan, the book of tiers takes it down.
        """
        node = reply.metadata.src_node_id
        if reply.has_error():
            self._refuse_cohort(node, _reason(reply.error))
            return
        try:
            for part in self._parts(reply):
                self._count_upload(node, part)
                if isinstance(part, Refusal) and self._asks_again(node, part):
                    continue
                self._settle(node, part)
        except FrameError as error:
            self._refuse_cohort(node, str(error))
        # Flower's loop holds a round's messages until the next round's have come.
        reply.content.clear()
        record = self._ledger.current
        record.train_seconds = max(record.train_seconds, self._train_seconds[node])

    def to_ask_again(self) -> Retries:
        """Return who needs another request, since this was called last."""
        again, self._again = self._again, Retries()
        return again

    def refuse_absent(self, sampled: Iterable[str]) -> None:
        """Refuse the clients without a reply, and put refusals in the order of nodes."""
        self._ledger.current.refused.sort(key=lambda refused: int(refused.get("node", -1)))
        homes = self._homes()
        for name in sampled:
            if name in self._accepted or self._was_refused(name):
                continue
            node = homes.get(name)
            if name in self._asked_again:
                reason = f"{self._asked_again[name]}; nothing usable came when it was asked again."
            elif node is None:
                reason = "the node that it lives on is not connected."
            else:
                reason = f"node {node}: no reply came before the round's deadline."
            self._ledger.refuse(name, reason, node)

    def updates(self) -> Iterator[Update]:
        """Decode the accepted frames, in the order of the clients' names.

        A frame that does not decode to finite values is refused and left out. Iterate once.
        """
        homes = self._homes()
        for name in sorted(self._accepted):
            frame, place = self._accepted[name]
            frame = replace(frame, payload=self._payloads.get(place))
            tier = self._tiers.of(name)
            try:
                change = self._decode(frame, self._plan.uplink(tier.groups, tier.head_groups))
            except FrameError as error:
                self._ledger.refuse(name, str(error), homes[name])
                continue
            yield Update(name, change, tier.where, frame.num_examples, frame.loss)
        self._payloads.close()

    def _decode(self, frame: Frame, coding: VectorCodec) -> np.ndarray:
        seed = derive_seed("client", self._plan.seed, frame.server_round, frame.client)
        change = coding.decode(frame.payload, seed=derive_seed("encode", seed))
        if not (np.abs(change) <= LARGEST_VALUE).all():
            raise FrameError(
                f"an update's values are at most {LARGEST_VALUE:g} in magnitude, and no NaN: the "
                f"largest here is {np.abs(change).max():g}."
            )
        return change

    def _asks_again(self, node: int, refusal: Refusal) -> bool:
        """Note a refusal whose code names what the server can send or do instead."""
        again, code = self._again, refusal.code
        name = self._names.get(refusal.client, "")
        clients: Sequence[str] = [name]
        if code in (RefusalCode.PLAN_MISSING, RefusalCode.REFERENCE_MISSING):
            nodes = again.no_plan if code == RefusalCode.PLAN_MISSING else again.no_reference
            if node not in nodes:
                nodes.append(node)
            clients = self._cohorts.get(node, [])
        elif not self._is_due(node, name):
            return False
        elif code == RefusalCode.OTHER_TIER and self._tiers.move(name, refusal.density):
            again.other_tier.setdefault(node, []).append(name)
        elif code == RefusalCode.RESIDUAL_MISSING:
            again.no_residual.setdefault(node, []).append(name)
        else:
            return False
        self._asked_again.update(dict.fromkeys(clients, refusal.text))
        return True

    def _is_due(self, node: int, name: str) -> bool:
        return name in self._cohorts.get(node, []) and name not in self._accepted

    def _parts(self, reply: Message) -> Iterator[Frame | Refusal]:
        cohort = self._cohorts.get(reply.metadata.src_node_id, [])
        return iter(
            unpack_frames(
                from_record(reply.content),
                max_frames=2 * len(cohort),
                max_payload_bytes=self._longest,
                views=True,
            )
        )

    def _settle(self, node: int, part: Frame | Refusal) -> None:
        """Accept one frame and count its training seconds, or record the refusal."""
        name = self._names.get(part.client, "")
        if name not in self._cohorts.get(node, []):  # nobody speaks in another's name
            stranger = f"node {node}, client {part.client:016x}"
            reason = f"node {node} was not asked to train this client."
            self._ledger.refuse(stranger, reason, node)
            return
        try:
            self._check(node, part, name)
        except ReplyError as error:
            self._ledger.refuse(name, str(error), node)
            return
        assert isinstance(part, Frame)
        self._accepted[name] = replace(part, payload=b""), self._payloads.put(part.payload)
        self._train_seconds[node] += part.train_seconds
        self._answered(node, name, self._round)

    def _count_upload(self, node: int, part: Frame | Refusal) -> None:
        """Count a client's bytes, whether its frame is used or not."""
        if self._names.get(part.client, "") in self._cohorts.get(node, []):
            self._ledger.add_client_bytes(up=single_client_bytes(bytes(part.num_bytes), reply=True))

    def _check(self, node: int, part: Frame | Refusal, name: str) -> None:
        if name in self._accepted:
            raise FrameError(f"node {node} sent a second frame for this client.")
        if isinstance(part, Refusal):
            raise ReplyError(part.text)
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
        if not 1 <= part.num_examples <= rows:
            raise FrameError(
                f"an update has at least 1 example and at most the client's {rows} rows, got "
                f"{part.num_examples}."
            )
        if not 0 <= part.loss < math.inf:
            raise FrameError(f"a training loss is finite and not negative, got {part.loss}.")

    def _refuse_cohort(self, node: int, reason: str) -> None:
        """Refuse all of a node's clients whose frames had not been read yet."""
        for name in self._cohorts.get(node, []):
            if name not in self._accepted and not self._was_refused(name):
                self._ledger.refuse(name, f"node {node}: {reason}", node)

    def _homes(self) -> dict[str, int]:
        """Return client -> the node that was sent it to train."""
        return {name: node for node, cohort in self._cohorts.items() for name in cohort}

    def _was_refused(self, name: str) -> bool:
        return any(refused["who"] == name for refused in self._ledger.current.refused)


def _reason(error: Error) -> str:
    """Return an error's reason, with advice where a worker died or one of Flower's mods failed."""
    reason = error.reason or "an unnamed error."
    if any(died in reason for died in WORKER_DIED):
        return (
            "its worker died, and again each time that it was asked once more. If memory ran out, "
            "lower training.batch-size or run.workers."
        )
    if error.code == MOD_REFUSED or STYPE in reason:
        reason += (
            " Flower's mods for differential privacy clip and perturb arrays of floats, and a "
            "message here is one coded frame: take the mod off the ClientApp."
        )
    return reason
