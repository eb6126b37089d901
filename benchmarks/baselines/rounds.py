"""Serve the baselines' rounds by Flower's own FedAvg, a message a client, metered."""

from __future__ import annotations

import time
from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from benchmarks.baselines.ledger import DenseLedger, LedgerMixin
from fedpet.config import Experiment
from fedpet.errors import RunError
from fedpet.protocol.ledger import Ledger
from fedpet.server.client_pool import ClientPool


class _ClientRounds(FedAvg):
    """Send one message a client, to the clients that fedpet draws."""

    def __init__(self, experiment: Experiment, population: ClientPool, ledger: DenseLedger) -> None:
        super().__init__(min_available_nodes=1, min_train_nodes=1)
        self.experiment = experiment
        self.population = population
        self.ledger: Ledger = ledger
        self._weigh_alone = ledger.weigh_alone
        self._asked: list[tuple[str, Message]] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Make one message a client, to the node where fedpet would train it."""
        settings = self.experiment.strategy
        clients = self.population.sample(
            server_round, settings.clients_per_round, self.experiment.run.seed
        )
        cohorts = self.population.cohorts(clients, self._wait_for_nodes(grid))
        self._asked = []
        for node, cohort in cohorts.items():
            for client in cohort:
                told = ConfigRecord({"server-round": server_round, "client": client})
                content = RecordDict({"arrays": arrays, "config": told})
                message = Message(content, dst_node_id=node, message_type="train")
                self._asked.append((client, message))
                self.ledger.add_client_bytes(down=self._weigh_alone(content, is_reply=False))
        self.ledger.current.clients = len(clients)
        return [message for _, message in self._asked]

    def _wait_for_nodes(self, grid: Grid) -> list[int]:
        limit = time.monotonic() + self.experiment.strategy.node_wait_seconds
        while not (nodes := sorted(grid.get_node_ids())):
            if time.monotonic() > limit:
                raise RunError("no node came within strategy.node-wait-seconds.")
            time.sleep(0.1)
        return nodes

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Flower's average, over the replies in the order of the clients' names.

        The order of the sum is settled here so that the result does not depend on which worker
        was faster.
        """
        answers = {reply.metadata.reply_to_message_id: reply for reply in replies}
        record = self.ledger.current
        usable: list[Message] = []
        seconds: dict[int, float] = {}
        for client, message in sorted(self._asked, key=lambda asked: asked[0]):
            answer = answers.get(message.metadata.message_id)
            if answer is None:
                self.ledger.refuse(client, "no reply came before the round's deadline.")
            elif answer.has_error():
                self.ledger.refuse(client, answer.error.reason or "an unnamed error.")
            else:
                usable.append(answer)
                self.ledger.add_client_bytes(up=self._weigh_alone(answer.content, is_reply=True))
                node = message.metadata.dst_node_id
                (metrics,) = answer.content.metric_records.values()
                seconds[node] = seconds.get(node, 0.0) + float(metrics["train-seconds"])  # type: ignore[arg-type]
        self._asked = []
        averaged, metrics_of_all = super().aggregate_train(server_round, usable)
        for answer in usable:
            answer.content.clear()  # Flower's loop holds a round's replies through the next round
        record.replies = len(usable)
        record.train_seconds = max(seconds.values(), default=0.0)
        if metrics_of_all is not None:
            record.loss = float(metrics_of_all["train-loss"])  # type: ignore[arg-type]
        return averaged, metrics_of_all

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """No message: the server evaluates."""
        return []

    def summary(self) -> None:
        """Say nothing: the run's own progress does."""


class DenseFedAvg(LedgerMixin, _ClientRounds):
    """Flower's own FedAvg over tensors, a message a client, metered as fedpet's strategies are.

    Equality: the aggregate is `FedAvg.aggregate_train` of the same replies, to the bit, where
    those come in the order of the clients' names.
    """
