"""What is known of each aggregation rule before it runs: its parameters, and how many it needs.

    config -> [rules] -> ... -> strategy

In:  the name of a strategy and the parameters that an experiment gives.
Out: nothing, or one sentence on what is wrong; the number of replies a round must have.

The rules themselves are Flower's. What is settled here is when they mean what they say: Flower's
Krum, say, picks a reply from any number of replies, and with fewer than 2 f + 3 the one it picks
may be a liar's.

Source: Blanchard et al., NeurIPS 2017 (Krum, MultiKrum: n >= 2 f + 3); El Mhamdi et al., ICML 2018
(Bulyan: n >= 4 f + 3). Ours: a median needs 3, and a trimmed mean as many as let it trim one from
either end, since with fewer they are a plain mean that protects nobody.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedpet.errors import ConfigError

__all__ = ["ROBUST_STRATEGIES", "STRATEGY_PARAMETERS", "check_parameters", "min_usable_replies"]

# Strategy -> the parameters that it takes.
STRATEGY_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "fedavg": (),
    "fedprox": (),  # its term is the clients': training.proximal-mu
    "fedavgm": ("server_learning_rate", "server_momentum"),
    "fedadam": ("server_learning_rate", "beta_1", "beta_2", "tau"),
    "fedyogi": ("server_learning_rate", "beta_1", "beta_2", "tau"),
    "fedadagrad": ("server_learning_rate", "tau"),
    "fedmedian": (),
    "fedtrimmedavg": ("trim_fraction",),
    "krum": ("num_malicious",),
    "multikrum": ("num_malicious", "num_selected"),
    "bulyan": ("num_malicious",),
    "qfedavg": ("q", "client_learning_rate"),
}
# Those that compare whole replies with each other: all clients must send the same entries.
ROBUST_STRATEGIES = ("fedmedian", "fedtrimmedavg", "krum", "multikrum", "bulyan", "qfedavg")


PARAMETERS = frozenset(name for takes in STRATEGY_PARAMETERS.values() for name in takes)


def check_parameters(name: str, given: Mapping[str, Any]) -> None:
    """Refuse a parameter that the rule does not take.

    Args:
        name: Of the strategy.
        given: What differs from its default, by the name of its field; others than parameters of
            rules are left alone.

    Raises:
        ConfigError: It names the rules that do take it.
    """
    for parameter, value in given.items():
        if parameter in PARAMETERS and parameter not in STRATEGY_PARAMETERS[name]:
            takers = ", ".join(
                rule for rule, takes in STRATEGY_PARAMETERS.items() if parameter in takes
            )
            raise ConfigError(
                f"strategy {name!r} takes no {_key(parameter)}, got {value!r}: it belongs to "
                f"{takers}."
            )


def min_usable_replies(
    name: str, num_malicious: int, num_selected: int, trim_fraction: float
) -> int:
    """Usable replies that a round of this rule needs.

    Example:
        >>> least_replies("krum", num_malicious=2, num_selected=1, trim_fraction=0.2)
        7
    """
    if name == "fedmedian":
        return 3
    if name == "fedtrimmedavg":
        number = math.ceil(1 / trim_fraction) if trim_fraction else 1
        return number if not trim_fraction or int(trim_fraction * number) else number + 1
    if name == "krum":
        return 2 * num_malicious + 3
    if name == "multikrum":
        return max(2 * num_malicious + 3, num_malicious + num_selected)
    if name == "bulyan":
        return 4 * num_malicious + 3
    return 1


def _key(field: str) -> str:
    return field.replace("_", "-")
