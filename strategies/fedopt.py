"""Take a step of an optimiser on the server, the mean update being its gradient.

Reference: Hsu et al., 2019, arXiv:1909.06335 (FedAvgM); Reddi et al., ICLR 2021, arXiv:2003.00295
(FedAdam, FedYogi, FedAdagrad).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fedpet.config.ranges import FromZero, Range

from .strategy import Strategy, register

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy as FlowerStrategy

    from fedpet.config import TrainingConfig

__all__ = ["FedAdagrad", "FedAdam", "FedAvgM", "FedYogi"]

Momentum = Annotated[float, Range(0, 1, below=True)]
Tau = Annotated[float, Range(1e-12, advice="It is added below a root that may be 0.")]


@register("fedavgm")
class FedAvgM(Strategy):
    """Flower's FedAvgM: momentum on the server.

    Example:
        >>> FedAvgM(server_momentum=0.9).server_momentum
        0.9
    """

    server_learning_rate: FromZero = 0.0  # fedavgm, fedadam, fedyogi, fedadagrad; 0 is Flower's own
    server_momentum: Momentum = 0.0  # fedavgm: of the mean updates before
    has_server_optimizer = True

    def flower_strategy(self, training: TrainingConfig) -> FlowerStrategy:
        from flwr.serverapp.strategy import FedAvgM as Flowers

        rate = self.server_learning_rate or 1.0
        return Flowers(server_learning_rate=rate, server_momentum=self.server_momentum)


@register("fedadam")
class FedAdam(Strategy):
    """Flower's FedAdam: Adam on the server.

    Example:
        >>> FedAdam(server_learning_rate=0.01, beta_1=0.9, clients_per_round=10).beta_2
        0.99
        >>> FedAdam(tau=0)
        Traceback (most recent call last):
        fedpet.errors.ConfigError: strategy.tau must be at least 1e-12, got 0.0. It is \
added below a root that may be 0.
    """

    server_learning_rate: FromZero = 0.0  # fedavgm, fedadam, fedyogi, fedadagrad; 0 is Flower's own
    beta_1: Momentum = 0.9  # fedadam, fedyogi: of the mean update
    beta_2: Momentum = 0.99  # fedadam, fedyogi: of its square
    tau: Tau = 1e-3  # fedadam, fedyogi, fedadagrad: added to the root of the square
    has_server_optimizer = True

    def flower_strategy(self, training: TrainingConfig) -> FlowerStrategy:
        from flwr.serverapp.strategy import FedAdam as Flowers

        eta = self.server_learning_rate or 0.1
        return Flowers(eta=eta, beta_1=self.beta_1, beta_2=self.beta_2, tau=self.tau)


@register("fedyogi")
class FedYogi(Strategy):
    """Flower's FedYogi: Adam on the server, whose squares grow no faster than they shrink.

    Example:
        >>> FedYogi(server_learning_rate=0.01).tau
        0.001
    """

    server_learning_rate: FromZero = 0.0  # fedavgm, fedadam, fedyogi, fedadagrad; 0 is Flower's own
    beta_1: Momentum = 0.9  # of the mean update
    beta_2: Momentum = 0.99  # of its square
    tau: Tau = 1e-3  # added to the root of the square
    has_server_optimizer = True

    def flower_strategy(self, training: TrainingConfig) -> FlowerStrategy:
        from flwr.serverapp.strategy import FedYogi as Flowers

        eta = self.server_learning_rate or 0.01
        return Flowers(eta=eta, beta_1=self.beta_1, beta_2=self.beta_2, tau=self.tau)


@register("fedadagrad")
class FedAdagrad(Strategy):
    """Flower's FedAdagrad: Adagrad on the server.

    Example:
        >>> FedAdagrad(server_learning_rate=0.01).tau
        0.001
    """

    server_learning_rate: FromZero = 0.0  # fedavgm, fedadam, fedyogi, fedadagrad; 0 is Flower's own
    tau: Tau = 1e-3  # added to the root of the sum of squares
    has_server_optimizer = True

    def flower_strategy(self, training: TrainingConfig) -> FlowerStrategy:
        from flwr.serverapp.strategy import FedAdagrad as Flowers

        return Flowers(eta=self.server_learning_rate or 0.1, tau=self.tau)
