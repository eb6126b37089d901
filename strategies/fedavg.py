"""Average the clients' values, weighted by their rows: FedAvg and FedProx."""

from __future__ import annotations

from dataclasses import field, replace
from typing import TYPE_CHECKING

from fedpet.config.ranges import FromZero
from fedpet.errors import ConfigError

from .strategy import Strategy, register

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy as FlowerStrategy

    from fedpet.config import StrategyConfig, TrainingConfig

__all__ = ["FedAvg", "FedProx"]


@register("fedavg")
class FedAvg(Strategy):
    """Flower's FedAvg: the mean of the replies, weighted by rows.

    Reference: McMahan et al., AISTATS 2017, arXiv:1602.05629.

    Example:
        >>> FedAvg(clients_per_round=10, quorum=0.8).min_usable_replies
        1
        >>> FedAvg(quorum=1.5)
        Traceback (most recent call last):
        fedpet.errors.ConfigError: strategy.quorum must be in [0, 1], got 1.5. It is the fraction \
of a round's clients that must give a usable reply.
    """

    def with_training(self, training: TrainingConfig) -> tuple[StrategyConfig, TrainingConfig]:
        if training.proximal_mu:
            raise ConfigError(
                f"training.proximal-mu is {training.proximal_mu!r}, and strategy 'fedavg' "
                "has no proximal term: name the strategy 'fedprox', or set it to 0."
            )
        return self, training

    def flower_strategy(self, training: TrainingConfig) -> FlowerStrategy:
        from flwr.serverapp.strategy import FedAvg as Flowers

        return Flowers()


@register("fedprox")
class FedProx(Strategy):
    """Flower's FedProx: FedAvg on the server, and a pull to the global values on the clients.

    The clients read their term in the plan, as `training.proximal_mu`; in an experiment file the
    key is `training.proximal-mu`.

    Reference: Li et al., MLSys 2020, arXiv:1812.06127.

    Attributes:
        proximal_mu: Weight of the term; 0 leaves it to the training settings.

    Example:
        >>> from fedpet.config import Experiment
        >>> Experiment(strategy=FedProx(proximal_mu=0.1)).training.proximal_mu
        0.1
    """

    proximal_mu: FromZero = field(default=0.0, metadata={"is_key": False})

    def with_training(self, training: TrainingConfig) -> tuple[StrategyConfig, TrainingConfig]:
        mu = self.proximal_mu or training.proximal_mu
        if not mu:
            raise ConfigError(
                "strategy 'fedprox' needs training.proximal-mu above 0: at 0 it is 'fedavg'."
            )
        if training.proximal_mu not in (0, mu):
            raise ConfigError(
                f"the proximal term is {mu!r} in strategy 'fedprox' and {training.proximal_mu!r} "
                "in training.proximal-mu: give it once."
            )
        return replace(self, proximal_mu=0.0), replace(training, proximal_mu=mu)

    def flower_strategy(self, training: TrainingConfig) -> FlowerStrategy:
        from flwr.serverapp.strategy import FedProx as Flowers

        return Flowers(proximal_mu=training.proximal_mu)
