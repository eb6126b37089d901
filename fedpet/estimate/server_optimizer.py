"""How the server's values move: by the mean update, or as the run's rule makes of it.

    outline -> layout -> draws -> [rules] -> updates -> downlink -> messages -> cost

In:  the strategy's parameters, and the mean update of a round.
Out: the values after it.

Lengths hang on that in one way: a client adds its steps to the values it was sent, and what it
sends back has the fewer digits, the larger those are. FedAdam's moves are thirty times the mean.

Source: Flower 1.41, `flwr.serverapp.strategy`: FedAvgM, FedAdam, FedYogi, FedAdagrad.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from fedpet.config import StrategyConfig

__all__ = ["ServerRule"]

Floats = npt.NDArray[np.float32]

_RATES = {"fedavgm": 1.0, "fedadam": 0.1, "fedyogi": 0.01, "fedadagrad": 0.1}  # Flower's own


class ServerRule:
    """One strategy's server, over a few rounds."""

    def __init__(self, config: StrategyConfig) -> None:
        self._config = config
        self._rate = config.server_learning_rate or _RATES.get(config.name, 1.0)
        self._first: Floats | None = None  # momentum
        self._second: Floats | None = None  # of squares

    @property
    def is_mean(self) -> bool:
        """Whether the values move by no more than the update that the rule settles on."""
        return self._config.name not in _RATES

    def num_averaged(self, num_replies: int) -> int:
        """Of how many updates the rule takes the mean, or something as quiet."""
        config = self._config
        count = {
            "krum": 1,
            "multikrum": config.num_selected,
            "bulyan": num_replies - 4 * config.num_malicious,
        }.get(config.name, num_replies)
        return min(max(count, 1), num_replies)

    def move(self, values: Floats, mean: Floats, server_round: int) -> Floats:
        """The values after a round, float32 (n,)."""
        name, config = self._config.name, self._config
        if self.is_mean:
            return values + mean
        first = np.zeros_like(mean) if self._first is None else self._first
        if name == "fedavgm":
            self._first = np.float32(config.server_momentum) * first + mean
            return values + np.float32(self._rate) * self._first
        second = np.zeros_like(mean) if self._second is None else self._second
        beta_1, beta_2 = (0.0, 0.0) if name == "fedadagrad" else (config.beta_1, config.beta_2)
        self._first = np.float32(beta_1) * first + np.float32(1 - beta_1) * mean
        square: Floats = np.square(mean)
        rate = self._rate
        if name == "fedadam":
            second = np.float32(beta_2) * second + np.float32(1 - beta_2) * square
            rate *= math.sqrt(1 - beta_2 ** (server_round + 1)) / (1 - beta_1 ** (server_round + 1))
        elif name == "fedyogi":
            toward = np.sign(second - square)
            second = second - np.float32(1 - beta_2) * square * toward
        else:
            second = second + square
        self._second = second
        root = np.sqrt(second) + np.float32(config.tau)
        return values + np.float32(rate) * self._first / root
