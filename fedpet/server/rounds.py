"""The rounds of every strategy here: send, read, refuse, and let Flower's rule combine the rest.

    ... -> codec -> plan -> client -> [strategy] -> ledger -> report

In:  the global values, held by Flower's round loop as one float32 array.
Out: the same after a round: each client's update decoded, checked, and combined with the others.

A train message names the cohort that its node is to train (`requests`). Replies are frames
(`replies`), decoded one at a time into what Flower's rule is given (`vectors`).
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.exception import AggregationError
from flwr.serverapp.strategy import Result

from fedpet.config import StrategyConfig
from fedpet.errors import ConfigError
from fedpet.pet.tiers import Tier
from fedpet.protocol.ledger import Ledger
from fedpet.protocol.plan import Plan
from fedpet.server.aggregation import Counted, client_messages, mean_message
from fedpet.server.arrays import from_arrays, to_arrays
from fedpet.server.client_pool import ClientPool
from fedpet.server.metering import LedgerMixin
from fedpet.server.replies import LARGEST_VALUE, Replies
from fedpet.server.reply_stream import StreamingGrid
from fedpet.server.requests import Requests, wait_for_nodes
from fedpet.server.server_state import Memory, RoundOffset
from fedpet.server.tier_assignment import TierAssignment
from fedpet.utils.gc_paused import kept_from_collection

WIRE = "wire/"  # before the names of what the wire remembers, in `state`
MAX_REPEATS = (
    3  # for each node, of a request that could not be answered as it was made: plan, tier, residual
)

LOG = logging.getLogger("fedpet")


class SparseRounds(Memory):
    """The rounds themselves; `MeanAggregation` and `PerClientAggregation` are what to put in front
    of a rule.

    Args:
        plan: What all clients agree on.
        tiers: What clients of each strength train, see `fedpet.pet.tiers.tiers_of`; mostly one.
        population: Clients, and where they live.
        config: Clients a round, quorum, deadlines, the rule's parameters.
        ledger: Where bytes, refusals and seconds are counted.
    """

    def __init__(
        self,
        *,
        plan: Plan,
        tiers: Sequence[Tier],
        population: ClientPool,
        config: StrategyConfig,
        ledger: Ledger,
    ) -> None:
        super().__init__(**self.flower_kwargs(config, plan))
        self.fraction_train = 0.0  # Flower samples nobody and makes no message: that is done here
        self.plan = plan
        self.config = config
        self.ledger = ledger
        self._names = population.by_number()
        self._num_rows = population.num_rows
        self.tiers = TierAssignment(tiers, plan.mask, self._names.values())
        self.requests = Requests(
            plan=plan, tiers=self.tiers, population=population, config=config, ledger=ledger
        )
        self._starting = False

    def flower_kwargs(self, config: StrategyConfig, plan: Plan) -> dict[str, Any]:
        """With what Flower's strategy behind this is made."""
        return {}

    @abstractmethod
    def aggregate_to_messages(self, values: np.ndarray, updates: Counted) -> list[Message]:
        """What Flower's strategy is given to aggregate."""

    @property
    def digest(self) -> bytes:
        """By which messages name the plan."""
        return self.requests.digest

    # -- down -------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message a node: its cohort, the global values, the plan if it may lack it."""
        nodes = wait_for_nodes(grid, self.config.node_wait_seconds)
        self._repeats: Counter[int] = Counter()
        self._values = from_arrays(arrays)
        super().configure_train(server_round, arrays, config, grid)  # the rule notes the values
        messages = self.requests.of_round(server_round, self._values, nodes)
        self._replies = Replies(
            server_round=server_round,
            plan=self.plan,
            digest=self.digest,
            cohorts=self.requests.cohorts,
            names=self._names,
            num_rows=self._num_rows,
            tiers=self.tiers,
            ledger=self.ledger,
            answered=self.requests.answered,
        )
        return messages

    # -- up ---------------------------------------------------------------------------------

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Refuse what does not fit; combine the rest by Flower's rule if they are enough.

        Args:
            server_round: The round.
            replies: Those that were not taken as they came: none where `start` runs the loop.
        """
        for reply in replies:
            self._replies.take(reply)
        self._replies.refuse_absent(self.requests.sampled)
        updates = Counted(self._replies.updates())
        messages = self.aggregate_to_messages(self._values, updates)
        record = self.ledger.current
        record.replies, record.loss = updates.count, updates.loss
        for refused in record.refused:
            LOG.warning("round %s: %s: %s", server_round, refused["who"], refused["reason"])
        try:
            self._check_enough(updates.count)
            combined = self._combine(server_round, messages)
            self.requests.settle(server_round, updates.names)
            return combined
        except AggregationError as error:
            LOG.warning("round %s: %s The values stay as they were.", server_round, error)
            return None, None

    def _combine(
        self, server_round: int, messages: list[Message]
    ) -> tuple[ArrayRecord, MetricRecord | None]:
        """What Flower's rule makes of the replies, unless it is no number."""
        before = super().state()
        with np.errstate(all="ignore"):
            arrays, metrics = super().aggregate_train(server_round, messages)
            values = self._values if arrays is None else from_arrays(arrays).astype(np.float32)
        cached = all(np.isfinite(vector).all() for vector in super().state().values())
        if arrays is None or not (cached and (np.abs(values) <= LARGEST_VALUE).all()):
            super().load_state(before)
            raise AggregationError(
                f"the rule's result holds NaN or infinity, or values beyond {LARGEST_VALUE:g}, or "
                "what it remembers does."
            )
        return to_arrays(values), metrics

    def _check_enough(self, count: int) -> None:
        asked = len(self.requests.sampled)
        needed = max(math.ceil(self.config.quorum * asked), self.config.min_usable_replies)
        if count < needed:
            rule = self.config.min_usable_replies
            raise AggregationError(
                f"{count} of {asked} replies are usable, {needed} are needed"
                + (f" by {self.config.name!r} and its parameters." if needed == rule else ".")
            )

    def _take(self, reply: Message) -> list[Message]:
        """Count and read a reply as it comes; give what to ask once more in another way."""
        self.ledger.add_message(reply)
        self._replies.take(reply)
        again, node = self._replies.to_ask_again(), reply.metadata.src_node_id
        if not again or self._repeats[node] == MAX_REPEATS:
            return []
        self._repeats[node] += 1
        asked = self.requests.again(again)
        for message in asked:
            self.ledger.add_message(message)
        return asked

    # -- from run to run --------------------------------------------------------------------

    def state(self) -> dict[str, np.ndarray]:
        """What the rule remembers, and what the wire does: who holds what, and the references."""
        return super().state() | {f"{WIRE}{k}": v for k, v in self.requests.state().items()}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Go back to what `state` gave; the wire stays as it is where that says nothing of it."""
        super().load_state({k: v for k, v in state.items() if not k.startswith(WIRE)})
        wire = {k.removeprefix(WIRE): v for k, v in state.items() if k.startswith(WIRE)}
        if wire:
            self.requests.load_state(wire)

    # -- around the rounds ------------------------------------------------------------------

    def start(self, grid: Grid, *args: Any, **kwargs: Any) -> Result:
        """Flower's loop, see `flwr.serverapp.strategy.Strategy.start`; replies are taken early."""
        self._starting = True
        with kept_from_collection():
            return super().start(StreamingGrid(grid, self._take), *args, **kwargs)

    def summary(self) -> None:
        """Say nothing: the run's own progress does.

        Raises:
            ConfigError: Another strategy's `start` asks, since it is wrapped around this one.
        """
        if not self._starting:
            raise ConfigError(
                f"{type(self).__name__} was started by a strategy wrapped around it. Flower's "
                "wrappers for differential privacy clip and perturb arrays of floats, and what "
                "clients send here are coded frames: start it by itself."
            )

    # Evaluation is the server's.

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """No message: an evaluation by the clients would send the values a second time."""
        return []


class MeanAggregation(RoundOffset, LedgerMixin, SparseRounds):
    """Put in front of a Flower strategy that averages: no more than one vector is held."""

    def aggregate_to_messages(self, values: np.ndarray, updates: Counted) -> list[Message]:
        return mean_message(values, updates)


class PerClientAggregation(RoundOffset, LedgerMixin, SparseRounds):
    """Put in front of a Flower strategy that compares replies: it sees one a client."""

    def aggregate_to_messages(self, values: np.ndarray, updates: Counted) -> list[Message]:
        return client_messages(values, updates)
