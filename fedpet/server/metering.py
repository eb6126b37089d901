"""What any Flower strategy needs to have its rounds measured: put `LedgerMixin` in front of it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from fedpet.protocol.ledger import Ledger

if TYPE_CHECKING:
    from flwr.serverapp.strategy import FedAvg as _Base
else:
    _Base = object


class LedgerMixin(_Base):
    """Counts each round's messages and seconds into `ledger`; changes nothing of the round.

    A round's seconds run from before its messages are made until its replies are averaged.
    Evaluation is not among them.
    """

    ledger: Ledger

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self.ledger.begin(server_round)
        self._round_started = time.perf_counter()
        return self._counted(super().configure_train(server_round, arrays, config, grid))

    def _counted(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Count messages as they are taken: a message that is sent need not be held."""
        for message in messages:
            self.ledger.add_message(message)
            yield message

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        for reply in replies:
            self.ledger.add_message(reply)
        averaged = super().aggregate_train(server_round, replies)
        record = self.ledger.current
        record.aggregated = averaged[0] is not None
        record.round_seconds = time.perf_counter() - self._round_started
        return averaged
