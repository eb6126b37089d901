"""What Flower's rules are given: dense float32 vectors in Flower's own messages.

    replies -> [vectors] -> Flower's rule

In:  the global values and the decoded updates, in the order of the clients' names.
Out: Flower messages, each with one array and one record of metrics.

A rule that is a mean gets one message that carries the mean: Flower's average of one is that one,
and what its server optimisers do next they do with it. A rule that compares replies gets one
message a client, whatever node it came from and with how many others: never a cohort.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from flwr.app import Message, MetricRecord, RecordDict

from fedpet.server.arrays import to_arrays
from fedpet.server.replies import Update
from fedpet.server.running_mean import RunningMean

WEIGHT, LOSS = "num-examples", "train-loss"


class Counted:
    """Updates, counted as they go by.

    Attributes:
        count: How many went by.
        weight: Their examples together.
        names: Their clients.
    """

    def __init__(self, updates: Iterable[Update]) -> None:
        self._updates = updates
        self._weighted_loss = 0.0
        self.count = 0
        self.weight = 0
        self.names: list[str] = []

    def __iter__(self) -> Iterator[Update]:
        for update in self._updates:
            self.count += 1
            self.names.append(update.name)
            self.weight += update.num_examples
            self._weighted_loss += update.num_examples * update.loss
            yield update

    @property
    def loss(self) -> float | None:
        """Mean training loss of those that went by; None where there were none."""
        return self._weighted_loss / self.weight if self.weight else None


def mean_message(values: np.ndarray, updates: Counted) -> list[Message]:
    """One message with the mean of all: one vector is held, however many come."""
    mean = RunningMean(len(values))
    for update in updates:
        mean.fold(update.change, update.where, update.num_examples)
    if updates.loss is None:
        return []
    return [_message(mean.moved(values), updates.weight, updates.loss)]


def client_messages(values: np.ndarray, updates: Counted) -> list[Message]:
    """One message a client, with the values that its training came to."""
    return [
        _message(values + update.change, update.num_examples, update.loss) for update in updates
    ]


def _message(values: np.ndarray, num_examples: int, loss: float) -> Message:
    """A train reply as Flower's own clients send it."""
    metrics = MetricRecord({WEIGHT: num_examples, LOSS: loss})
    content = RecordDict({"arrays": to_arrays(values), "metrics": metrics})
    return Message(content, reply_to=Message(RecordDict(), dst_node_id=1, message_type="train"))
