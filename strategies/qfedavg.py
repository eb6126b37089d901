"""Weigh clients with a high loss more: q-FedAvg.

Reference: Li et al., ICLR 2020, arXiv:1905.10497.
Deviation: the loss is the mean over the client's own epochs, as it trains; the paper's is that of
the values it was sent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedpet.config.ranges import FromZero
from fedpet.errors import ConfigError

from .strategy import Strategy, register

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy as FlowerStrategy

    from fedpet.config import TrainingConfig

__all__ = ["QFedAvg"]


@register("qfedavg")
class QFedAvg(Strategy):
    """Flower's QFedAvg: clients with a high loss weigh more.

    Example:
        >>> QFedAvg(q=0.3, client_learning_rate=0.1).q
        0.3
    """

    q: FromZero = 0.1  # qfedavg: the more, the more a client with a high loss weighs
    client_learning_rate: FromZero = 0.0  # qfedavg: 1 / L; 0 is training.learning-rate, if a number
    compares_replies = True

    def flower_strategy(self, training: TrainingConfig) -> FlowerStrategy:
        from flwr.serverapp.strategy import QFedAvg as Flowers

        rate = self.client_learning_rate or training.learning_rate
        if isinstance(rate, str):
            raise ConfigError(
                "strategy qfedavg needs one learning rate, and with training.learning-rate = "
                "'auto' each kind of module has its own: give strategy.client-learning-rate."
            )
        return Flowers(client_learning_rate=rate, q=self.q, train_loss_key="train-loss")
