"""The rounds of every strategy here: send, read, refuse, and average under a quorum.

    ... -> codec -> plan -> client -> [strategy] -> ledger -> report

In:  the global values, held by Flower's round loop as one float32 array.
Out: the same after a round: each client's update decoded, checked, and folded into a mean.

A train message names the cohort that its node is to train (`requests`). Replies are frames of a
few kilobytes (`replies`); they are decoded one at a time into a float64 sum (`mean`).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from fedpet.config import StrategyConfig
from fedpet.ledger import Ledger
from fedpet.plan import Plan
from fedpet.population import Population

from .arrays import to_arrays, values_of
from .mean import RunningMean
from .replies import Replies
from .requests import Requests, wait_for_nodes

if TYPE_CHECKING:
    from flwr.serverapp.strategy import FedAvg as _Base
else:
    _Base = object

LOG = logging.getLogger("fedpet")


class SparseRounds(_Base):
    """Put in front of one of Flower's strategies: its rounds carry the values of a plan."""

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
        self.groups = groups
        self.config = config
        self.ledger = ledger
        self.requests = Requests(
            plan=plan, groups=groups, population=population, config=config, ledger=ledger
        )
        self._names = population.by_number()

    @property
    def digest(self) -> bytes:
        """By which messages name the plan."""
        return self.requests.digest

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message a node: its cohort, the global values, the plan if it may lack it."""
        nodes = wait_for_nodes(grid, self.config.node_wait_seconds)
        self._grid = grid
        self._deadline = time.monotonic() + self.config.round_deadline_seconds
        self._values = values_of(arrays)
        return self.requests.of_round(server_round, self._values, nodes)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Refuse what does not fit, average the rest if the quorum is met."""
        mean = RunningMean(self.plan.num_values)
        for update in self._read(server_round, replies).updates(self.groups):
            mean.fold(update.change, update.num_examples, update.loss)
        record = self.ledger.current
        record.replies, record.loss = mean.count, mean.loss
        for refused in record.refused:
            LOG.warning("round %s: %s: %s", server_round, refused["who"], refused["reason"])
        if mean.count < self._needed():
            LOG.warning(
                "round %s: %s usable replies, %s are needed; the values stay as they were.",
                server_round,
                mean.count,
                self._needed(),
            )
            return None, None
        metrics = MetricRecord({"num-examples": mean.weight, "train-loss": mean.loss or 0.0})
        return to_arrays(mean.moved(self._values)), metrics

    def _read(self, server_round: int, messages: Iterable[Message]) -> Replies:
        """Read the replies; nodes that lack the plan are asked again before the deadline."""
        replies = Replies(
            server_round=server_round,
            plan=self.plan,
            digest=self.digest,
            cohorts=self.requests.cohorts,
            names=self._names,
            ledger=self.ledger,
        )
        lacking = replies.read(messages)
        if lacking:
            asked = self.requests.again(lacking)
            left = max(self._deadline - time.monotonic(), 0.0)
            answers = list(self._grid.send_and_receive(asked, timeout=left))
            for message in (*asked, *answers):
                self.ledger.count_wire(message)
            replies.read(answers)
        replies.refuse_absent(self.requests.sampled)
        return replies

    def _needed(self) -> int:
        """Usable replies without which a round changes nothing."""
        share = math.ceil(self.config.quorum * len(self.requests.sampled))
        return max(1, self.config.min_replies, share)

    # Evaluation is the server's.

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """No message: an evaluation by the clients would send the values a second time."""
        return []

    def summary(self) -> None:
        """Say nothing: the run's own progress does."""
