"""Move the server's values in an estimate: by the mean update, or by Flower's own optimiser.

Only one effect matters for sizes: updates are float32 differences, so the larger the global values,
the fewer significant bits an update has. FedAdam's steps are thirty times the mean update.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from flwr.app import ConfigRecord

from fedpet.config import StrategyConfig, TrainingConfig
from fedpet.protocol.flower_compat import quiet_flower
from fedpet.server.aggregation import aggregate, to_arrays, train_message
from fedpet.server.rounds import make_rule

__all__ = ["ServerRule"]

Floats = npt.NDArray[np.float32]


class ServerRule:
    """The server of one strategy, over a few rounds."""

    def __init__(self, config: StrategyConfig, training: TrainingConfig) -> None:
        self._config = config
        self._rule = make_rule(config, training)

    @property
    def is_mean(self) -> bool:
        """Whether the values move by no more than the update that the rule settles on."""
        return not self._config.has_server_optimizer

    def num_averaged(self, num_replies: int) -> int:
        """Return of how many updates the rule takes the mean, or something as quiet."""
        return min(max(self._config.num_averaged(num_replies), 1), num_replies)

    def move(self, values: Floats, mean: Floats, server_round: int) -> Floats:
        """Return the values after a round, float32 (n,)."""
        if self.is_mean:
            return values + mean
        reply = train_message(values + mean, num_examples=1, loss=0.0)
        with quiet_flower():
            self._rule.configure_train(server_round, to_arrays(values), ConfigRecord(), None)  # type: ignore[arg-type]  # no grid: nobody is sampled
            return aggregate(self._rule, server_round, values, [reply])[0]
