"""Aggregate a round's updates by Flower's strategy: as their mean, or one message a client.

A rule that averages is given one message with the mean of all updates: Flower's average of one
message is that message, and a server optimiser takes its step from there. Only one vector is held,
however many clients there are. A rule that compares replies is given one message a client, in the
order of the clients' names, whichever node it came from.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.exception import AggregationError
from flwr.serverapp.strategy import Strategy

from fedpet.codec import VectorCodec, VectorSum
from fedpet.pet.tiers import Where
from fedpet.protocol.flower_compat.flower_messages import make_reply
from fedpet.protocol.flower_compat.flower_strategies import (
    load_optimizer_state,
    optimizer_state,
    without_collections,
)
from fedpet.server.replies import LARGEST_VALUE, Update

__all__ = [
    "EachFold",
    "Fold",
    "MeanFold",
    "aggregate",
    "from_arrays",
    "reset_optimizer",
    "to_arrays",
]

VALUES = "values"  # name of the one array
WEIGHT, LOSS = "num-examples", "train-loss"


def to_arrays(values: np.ndarray) -> ArrayRecord:
    """Return the global values as the record that Flower's loop hands on: one float32 array."""
    return ArrayRecord({VALUES: Array(np.ascontiguousarray(values, dtype=np.float32))})


def from_arrays(arrays: ArrayRecord) -> np.ndarray:
    """Return the global values of `to_arrays`. float32, (num_values,)."""
    return arrays[VALUES].numpy()


class Fold:
    """Fold a round's updates one by one into what its rule is given.

    Args:
        values: Global values, float32, (num_values,).

    Attributes:
        names: Clients of the updates so far.
        weight: Of all of them together.
    """

    def __init__(self, values: np.ndarray) -> None:
        self._values = values
        self._weighted_loss = 0.0
        self.weight: float = 0
        self.names: list[str] = []

    def add(self, update: Update) -> None:
        """Add the next update, in the order of the clients' names.

        Raises:
            FrameError: It does not decode; it is left out.
        """
        self._add(update)
        self.names.append(update.name)
        self.weight += update.weight
        self._weighted_loss += update.weight * update.loss

    @property
    def loss(self) -> float | None:
        """Mean training loss of the updates so far; None without any."""
        return self._weighted_loss / self.weight if self.weight else None

    def messages(self) -> list[Message]:
        """Return the replies that the rule aggregates."""
        raise NotImplementedError

    def _add(self, update: Update) -> None:
        raise NotImplementedError


class MeanFold(Fold):
    """Give one message with the values moved by the mean update; none without updates.

    An entry's mean is over the clients that trained it. Updates are added as they were sent, in
    float64: what is coded on a shared rotation is rotated back once (fedpet/codec/vector_sum.py).
    """

    def __init__(self, values: np.ndarray) -> None:
        super().__init__(values)
        self._tiers: dict[VectorCodec, tuple[Where, VectorSum]] = {}

    def _add(self, update: Update) -> None:
        if update.coding not in self._tiers:
            rotation_seed = update.seeds["rotation_seed"]
            empty = update.coding.accumulator(rotation_seed, largest=LARGEST_VALUE)
            self._tiers[update.coding] = update.where, empty
        _, tier_sum = self._tiers[update.coding]
        tier_sum.add(update.payload, seed=update.seeds["seed"], weight=update.weight)

    def moved(self) -> np.ndarray:
        """Return the values plus the mean update; an entry that nobody trained stays as it was.

        Returns:
            float32, (num_values,).
        """
        total, weights = np.zeros((2, len(self._values)))
        for where, tier_sum in self._tiers.values():
            total[where] += tier_sum.total()
            weights[where] += tier_sum.weight
        mean = self._values.astype(np.float64) + total / np.maximum(weights, 1)
        return mean.astype(np.float32)

    def messages(self) -> list[Message]:
        """Return the one message."""
        if self.loss is None:
            return []
        return [train_message(self.moved(), self.weight, self.loss)]


class EachFold(Fold):
    """Give one message a client, with the values that its training came to."""

    def __init__(self, values: np.ndarray) -> None:
        super().__init__(values)
        self._messages: list[Message] = []

    def _add(self, update: Update) -> None:
        moved = self._values + update.decode()
        self._messages.append(train_message(moved, update.weight, update.loss))

    def messages(self) -> list[Message]:
        """Return the messages, in the order of the clients' names."""
        return self._messages


def train_message(values: np.ndarray, weight: float, loss: float) -> Message:
    """Make a train reply as Flower's own clients send it."""
    metrics = MetricRecord({WEIGHT: weight, LOSS: loss})
    return make_reply(RecordDict({"arrays": to_arrays(values), "metrics": metrics}), node=1)


def aggregate(
    rule: Strategy, server_round: int, values: np.ndarray, messages: Iterable[Message]
) -> tuple[np.ndarray, MetricRecord | None]:
    """Let Flower's strategy aggregate; its optimiser stays as it was where that came to nothing.

    Args:
        rule: Knows the global values from `configure_train`.
        server_round: From 1.
        values: Global values, float32, (num_values,).
        messages: Of a `Fold`.

    Returns:
        The new global values, float32, (num_values,), and Flower's metrics.

    Raises:
        AggregationError: The result or the optimiser holds NaN, infinity or a value beyond
            `LARGEST_VALUE`.
    """
    before = optimizer_state(rule)
    with np.errstate(all="ignore"), without_collections():
        arrays, metrics = rule.aggregate_train(server_round, messages)
        moved = values if arrays is None else from_arrays(arrays).astype(np.float32)
    finite = all(np.isfinite(vector).all() for vector in optimizer_state(rule).values())
    if arrays is None or not (finite and (np.abs(moved) <= LARGEST_VALUE).all()):
        reset_optimizer(rule, before)
        raise AggregationError(
            f"the rule's result holds NaN or infinity, or values beyond {LARGEST_VALUE:g}, or "
            "what it remembers does."
        )
    return moved, metrics


def reset_optimizer(rule: Strategy, state: dict[str, np.ndarray]) -> None:
    """Go back to an earlier `optimizer_state` of a rule."""
    load_optimizer_state(rule, state, VALUES)
