"""Combine replies by rules that a few malicious clients cannot lead astray.

Each compares whole replies, so it sees one message a client and all clients must train the same
entries. `replies_needed` is the number below which a rule does not mean what it says: Flower's
Krum, say, picks a reply from any number, and with fewer than 2 f + 3 the one it picks may be
malicious.

Reference: Blanchard et al., NeurIPS 2017, arXiv:1703.02757 (Krum, MultiKrum: n >= 2 f + 3);
El Mhamdi et al., ICML 2018, arXiv:1802.07927 (Bulyan: n >= 4 f + 3); Yin et al., ICML 2018,
arXiv:1803.01498 (median, trimmed mean).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

from fedpet.config.ranges import Count, Range, Whole

from .strategy import Strategy, register

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy as FlowerStrategy

    from fedpet.config import TrainingConfig

__all__ = ["Bulyan", "FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum"]

TrimFraction = Annotated[float, Range(0, 0.5, below=True)]


@register("fedmedian")
class FedMedian(Strategy):
    """Flower's FedMedian: the median of each value.

    Example:
        >>> FedMedian(clients_per_round=2)
        Traceback (most recent call last):
        fedpet.errors.ConfigError: strategy 'fedmedian' with these parameters, and min-replies, \
need 3 usable replies a round, and strategy.clients-per-round is 2: raise it.
    """

    compares_replies = True

    @property
    def replies_needed(self) -> int:
        return 3

    def flower_strategy(self, training: TrainingConfig) -> FlowerStrategy:
        from flwr.serverapp.strategy import FedMedian as Flowers

        return Flowers()


@register("fedtrimmedavg")
class FedTrimmedAvg(Strategy):
    """Flower's FedTrimmedAvg: the mean of each value without the extremes.

    It needs as many replies as let it trim one from either end: with fewer it is a plain mean,
    which protects nobody.

    Example:
        >>> FedTrimmedAvg(trim_fraction=0.1).replies_needed
        10
    """

    trim_fraction: TrimFraction = 0.2  # fedtrimmedavg: cut from either end; Flower's beta
    compares_replies = True

    @property
    def replies_needed(self) -> int:
        if not self.trim_fraction:
            return 1
        number = math.ceil(1 / self.trim_fraction)
        return number if int(self.trim_fraction * number) else number + 1

    def flower_strategy(self, training: TrainingConfig) -> FlowerStrategy:
        from flwr.serverapp.strategy import FedTrimmedAvg as Flowers

        return Flowers(beta=self.trim_fraction)


@register("krum")
class Krum(Strategy):
    """Flower's Krum: the one reply that is closest to its neighbours.

    Example:
        >>> Krum(num_malicious=2).replies_needed
        7
    """

    num_malicious: Whole = 0  # krum, multikrum, bulyan: malicious clients expected a round
    compares_replies = True

    @property
    def replies_needed(self) -> int:
        return 2 * self.num_malicious + 3

    def num_averaged(self, num_replies: int) -> int:
        return 1

    def flower_strategy(self, training: TrainingConfig) -> FlowerStrategy:
        from flwr.serverapp.strategy import Krum as Flowers

        return Flowers(num_malicious_nodes=self.num_malicious)


@register("multikrum")
class MultiKrum(Strategy):
    """Flower's MultiKrum: the mean of the replies that are closest to their neighbours.

    Example:
        >>> MultiKrum(num_malicious=2, num_selected=6).replies_needed
        8
    """

    num_malicious: Whole = 0  # malicious clients expected a round
    num_selected: Count = 1  # multikrum: replies that are averaged
    compares_replies = True

    @property
    def replies_needed(self) -> int:
        return max(2 * self.num_malicious + 3, self.num_malicious + self.num_selected)

    def num_averaged(self, num_replies: int) -> int:
        return self.num_selected

    def flower_strategy(self, training: TrainingConfig) -> FlowerStrategy:
        from flwr.serverapp.strategy import MultiKrum as Flowers

        return Flowers(
            num_malicious_nodes=self.num_malicious, num_nodes_to_select=self.num_selected
        )


@register("bulyan")
class Bulyan(Strategy):
    """Flower's Bulyan: of the replies that Krum selects, the mean of the values near the median.

    Example:
        >>> Bulyan(num_malicious=2).replies_needed
        11
    """

    num_malicious: Whole = 0  # malicious clients expected a round
    compares_replies = True

    @property
    def replies_needed(self) -> int:
        return 4 * self.num_malicious + 3

    def num_averaged(self, num_replies: int) -> int:
        return num_replies - 4 * self.num_malicious

    def flower_strategy(self, training: TrainingConfig) -> FlowerStrategy:
        from flwr.serverapp.strategy import Bulyan as Flowers

        return Flowers(num_malicious_nodes=self.num_malicious)
