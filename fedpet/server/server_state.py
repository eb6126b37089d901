"""What a strategy remembers from round to round, so that a run can go on after a crash."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar, TypeAlias

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from fedpet.server.arrays import VALUES

if TYPE_CHECKING:
    from flwr.serverapp.strategy import FedAvg as _Base
else:
    _Base = object


Vectors: TypeAlias = Mapping[str, type[dict[str, np.ndarray]] | type[list[np.ndarray]]]


class RoundOffset(_Base):
    """Counts rounds from where a run was left; Flower's loop counts from 1 whatever went before.

    Put it in front of everything that is told the number of a round.

    Attributes:
        rounds_done: Rounds that were over before the loop began.
    """

    rounds_done: int = 0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return super().configure_train(server_round + self.rounds_done, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        return super().aggregate_train(server_round + self.rounds_done, replies)


class Memory(_Base):
    """The vectors of a server optimiser, in and out.

    Attributes:
        remembers: Flower's attributes that hold them, and how: in a dict by the arrays' names,
            or in a list.
    """

    server_state_attributes: ClassVar[Vectors] = {}

    def state(self) -> dict[str, np.ndarray]:
        """The vectors by Flower's names; those that do not exist yet are left out."""
        held = {name: getattr(self, name) for name in self.server_state_attributes}
        return {
            name: value[VALUES] if isinstance(value, dict) else value[0]
            for name, value in held.items()
            if value
        }

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Go back to what `state` gave; to the beginning where a vector is not in it."""
        for name, kind in self.server_state_attributes.items():
            vector = state.get(name)
            held: dict[str, np.ndarray] | list[np.ndarray] | None = None
            if vector is not None:
                held = {VALUES: vector} if kind is dict else [vector]
            setattr(self, name, held)
        # Flower's optimisers hold the global values too, and take them from the next round's.
        vars(self)["current_arrays"] = None
