"""Run the rounds of a strategy: sample, request, collect, check, aggregate.

The loop is Flower's (`Strategy.start`), and so is the aggregation: `SparseStrategy` stands in front
of a Flower strategy, which sees float32 vectors. It holds the global values as one float32 array.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.exception import AggregationError
from flwr.serverapp.strategy import FedAvg, Result, Strategy

from fedpet.config import StrategyConfig, TrainingConfig
from fedpet.errors import ConfigError, FrameError
from fedpet.pet.tiers import Tier
from fedpet.protocol.flower_compat.flower_strategies import optimizer_state
from fedpet.protocol.ledger import Ledger
from fedpet.protocol.plan import Plan
from fedpet.server.aggregation import (
    EachFold,
    MeanFold,
    aggregate,
    from_arrays,
    reset_optimizer,
    to_arrays,
)
from fedpet.server.client_pool import ClientPool
from fedpet.server.client_spread import spreads_of
from fedpet.server.measuring import Measuring
from fedpet.server.pace import Pace
from fedpet.server.replies import Replies
from fedpet.server.reply_stream import StreamingGrid
from fedpet.server.requests import Requests, wait_for_nodes
from fedpet.server.tier_assignment import TierAssignment
from fedpet.utils.gc_paused import kept_from_collection

WIRE = "wire/"  # prefix, in `state`, of the entries that decide what is sent

LOG = logging.getLogger("fedpet")


def make_rule(config: StrategyConfig, training: TrainingConfig) -> Strategy:
    """Make a rule's Flower strategy, which samples nobody: fedpet's rounds do."""
    rule: Strategy = config.flower_strategy(training)
    if isinstance(rule, FedAvg):
        rule.fraction_train = 0.0
    return rule


class SparseStrategy(Strategy):
    """Run the rounds of a plan in front of a Flower strategy.

    Args:
        plan: What all clients agree on.
        tiers: What clients of each strength train, see `fedpet.pet.tiers.tiers_of`; mostly one.
        population: Clients, and the nodes they live on.
        config: Clients a round, quorum, deadlines, and the rule.
        ledger: Counts bytes, refusals and seconds.

    Attributes:
        rule: Flower's strategy, which aggregates.
        population: Clients, and the nodes they live on.
        rounds_done: Rounds that were over before the loop began: Flower's counts from 1 whatever
            went before.
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
        self.rule = make_rule(config, plan.training)
        self.plan = plan
        self.config = config
        self.ledger = ledger
        self.rounds_done = 0
        self.population = population
        ledger.node_name = population.node_name
        self._names = population.by_number()
        self._num_rows = population.num_rows
        self.tiers = TierAssignment(tiers, plan.mask, self._names.values())
        self.requests = Requests(
            plan=plan, tiers=self.tiers, population=population, config=config, ledger=ledger
        )
        self._starting = False

    @property
    def digest(self) -> bytes:
        """Digest that names the plan in messages."""
        return self.requests.digest

    def start(self, grid: Grid, *args: Any, **kwargs: Any) -> Result:
        """Run Flower's loop, see `flwr.serverapp.strategy.Strategy.start`.

        Replies are taken as they come, while others are still awaited.
        """
        self._starting = True
        with kept_from_collection():
            return super().start(StreamingGrid(grid, self._take, self._is_over), *args, **kwargs)

    # -- a round, in its order --------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Make each node's first messages: clients, the values, the plan if it may lack it."""
        server_round += self.rounds_done
        self.ledger.begin(server_round)
        self._round_started = time.perf_counter()
        nodes = wait_for_nodes(grid, self.config.node_wait_seconds)
        if self._leaves_slow_nodes and isinstance(grid, StreamingGrid):
            busy = grid.busy_nodes()
            self.population.set_busy(busy)
            nodes = [node for node in nodes if node not in busy] or nodes
        self._values = from_arrays(arrays)
        self.rule.configure_train(server_round, arrays, config, grid)  # it notes the values
        messages = self.requests.first_requests(server_round, self._values, nodes)
        self._replies = Replies(
            server_round=server_round,
            plan=self.plan,
            digest=self.digest,
            sampled=self.requests.sampled,
            names=self._names,
            num_rows=self._num_rows,
            tiers=self.tiers,
            longest_payload=self.requests.longest_payload,
            config=self.config,
            ledger=self.ledger,
            answered=self.requests.answered,
            population=self.population,
        )
        self._pace = Pace(self.config, len(self.requests.sampled))
        self._fold = (EachFold if self.config.compares_replies else MeanFold)(self._values)
        return self._counted(messages)

    def _counted(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Count messages as they are taken: one that is sent need not be held."""
        for message in messages:
            self.ledger.add_message(message)
            yield message

    def _take(self, reply: Message) -> Iterator[Message]:
        """Count and read a reply as it comes; make the messages that follow, and then fold."""
        self.ledger.add_message(reply)
        chunk = self.requests.chunk_of(reply)
        again = self._replies.take(reply, chunk)
        self._pace.note(
            elapsed=time.perf_counter() - self._round_started,
            num_answered=self._replies.num_answered,
            num_usable=self._replies.num_accepted,
        )
        yield from self._counted(self.requests.further_requests(chunk, again))
        # A rule that compares replies holds all vectors: they are decoded late. So are those whose
        # weights depend on who else answers.
        if not self.config.compares_replies and self.config.max_share == 1:
            self._fold_updates()

    def _is_over(self) -> bool:
        return self._pace.is_over(time.perf_counter() - self._round_started)

    @property
    def _leaves_slow_nodes(self) -> bool:
        return bool(self.config.pace or self.config.over_selection)

    def _why_absent(self, name: str) -> tuple[str, int | None]:
        reason, node = self.requests.why_absent(name)
        if node is not None and self._pace.reason:
            reason = f"node {self.population.node_name(node)}: {self._pace.reason}"
        return reason, node

    def _fold_updates(self) -> None:
        for update in self._replies.updates():
            try:
                self._fold.add(update)
            except FrameError as error:
                self.ledger.refuse(update.name, str(error), update.node)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Refuse replies that do not fit; aggregate the rest by Flower's rule if they are enough.

        Args:
            server_round: Counted by Flower's loop.
            replies: Messages not taken as they came: none where `start` runs the loop.
        """
        server_round += self.rounds_done
        for reply in replies:
            self.ledger.add_message(reply)
            self._replies.take(reply, self.requests.chunk_of(reply))
        self._replies.refuse_absent(self._why_absent)
        if self.config.max_share < 1:
            self._replies.weigh()
        self._fold_updates()
        fold, record = self._fold, self.ledger.current
        record.replies, record.loss = len(fold.names), fold.loss
        own = self._replies.metrics
        measured = [own[name] for name in fold.names if name in own]
        record.on_clients = spreads_of(measured, self.plan.task.metric)
        record.refused.sort(key=_by_node)
        for refused in record.refused:
            LOG.warning("round %s: %s: %s", server_round, refused["who"], refused["reason"])
        try:
            self._check_enough(len(fold.names))
            values, metrics = aggregate(self.rule, server_round, self._values, fold.messages())
            self.requests.settle(server_round, fold.names)
            record.aggregated = True
            return to_arrays(values), metrics
        except AggregationError as error:
            LOG.warning("round %s: %s The values stay as they were.", server_round, error)
            record.aggregated = False
            return None, None
        finally:
            record.round_seconds = time.perf_counter() - self._round_started

    def _check_enough(self, count: int) -> None:
        rule = self.config.min_usable_replies
        asked = len(self.requests.sampled)
        if self.config.over_selection:
            asked = min(asked, self.config.clients_per_round)
        needed = max(math.ceil(self.config.quorum * asked), rule)
        if count < needed:
            raise AggregationError(
                f"{count} of {asked} replies are usable, {needed} are needed"
                + (f" by {self.config.name!r} and its parameters." if needed == rule else ".")
            )

    def next_clients(self, server_round: int) -> list[str]:
        """Return the clients that a round would draw, in alphabetical order."""
        return self.population.sample(server_round, self.config.clients_per_round, self.plan.seed)

    def measuring(self) -> Measuring:
        """Return what has clients measure values outside of training."""
        return Measuring(
            plan=self.plan,
            plan_bytes=self.requests.plan_bytes,
            tiers=self.tiers.tiers,
            population=self.population,
            holders=self.requests.holders,
            ledger=self.ledger,
            node_wait_seconds=self.config.node_wait_seconds,
            deadline_seconds=self.config.round_deadline_seconds,
        )

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return no message: the server evaluates, and clients would be sent the values again."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return nothing: no client evaluates."""
        return None

    def summary(self) -> None:
        """Print nothing: the run's own progress does.

        Raises:
            ConfigError: The `start` of a strategy wrapped around this one calls it.
        """
        if not self._starting:
            raise ConfigError(
                f"{type(self).__name__} was started by a strategy wrapped around it. Flower's "
                "wrappers for differential privacy clip and perturb arrays of floats, and what "
                "clients send here are coded frames: start it by itself."
            )

    # -- from run to run --------------------------------------------------------------------

    def state(self) -> dict[str, np.ndarray]:
        """Return the server optimiser, the references, and the records of who holds which."""
        wire = {f"{WIRE}{name}": array for name, array in self.requests.state().items()}
        return optimizer_state(self.rule) | wire

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Go back to a `state`; references and records stay where it has none."""
        wire = {k.removeprefix(WIRE): v for k, v in state.items() if k.startswith(WIRE)}
        reset_optimizer(self.rule, {k: v for k, v in state.items() if not k.startswith(WIRE)})
        if wire:
            self.requests.load_state(wire)


def _by_node(refused: Mapping[str, str]) -> tuple[int, str, str]:
    """Order refusals by node, ids as numbers, and by client."""
    node = refused.get("node", "-1")
    number = int(node) if node.lstrip("-").isdecimal() else -1
    return number, node, refused["who"]
