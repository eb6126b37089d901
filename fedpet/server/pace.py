"""End a round before its deadline: when enough have answered, or by the pace of those that have.

Two rules, both off unless set, since what a round then takes in depends on who is fast (law 6 does
not hold, and the data of slow devices counts less):

    strategy.over-selection = x   (1 + x) times clients-per-round are drawn, rounded up; the round
                                  ends when clients-per-round have given a usable update
    strategy.pace = p             where half of the round's clients had answered after t seconds,
                                  refusals counted, the round ends p * t seconds after its begin

A client whose update comes later is refused by the rule that left it out; its update is lost, and
its device is not drawn again until it is done.

Reference: over-selection is that of Bonawitz et al., MLSys 2019, arXiv:1902.01046, section 2.2.
"""

from __future__ import annotations

import math

from fedpet.config import StrategyConfig

__all__ = ["Pace"]


class Pace:
    """Tell when a round is over.

    Args:
        config: The rules.
        num_sampled: The round's clients.

    Attributes:
        reason: Why it is over, for those that have not answered; "" while it is not.

    Example:
        >>> pace = Pace(StrategyConfig(pace=2.0), num_sampled=4)
        >>> pace.note(elapsed=10.0, num_answered=2, num_usable=2)
        >>> pace.is_over(19.0), pace.is_over(21.0)
        (False, True)
    """

    def __init__(self, config: StrategyConfig, num_sampled: int) -> None:
        self._config = config
        self._num_sampled = num_sampled
        self._is_enough = False
        self._half_seconds = math.inf  # in which half of the clients had answered
        self.reason = ""

    @staticmethod
    def num_drawn(config: StrategyConfig) -> int:
        """Return how many clients a round draws, where there are so many."""
        return math.ceil(config.clients_per_round * (1 + config.over_selection) - 1e-9)

    def note(self, *, elapsed: float, num_answered: int, num_usable: int) -> None:
        """Note how many clients have answered by now.

        Args:
            elapsed: Seconds since the round began.
            num_answered: Clients with an update or a refusal.
            num_usable: Clients with an update that is used.
        """
        enough = min(self._config.clients_per_round, self._num_sampled)
        self._is_enough = bool(self._config.over_selection) and num_usable >= enough
        if 2 * num_answered >= self._num_sampled:
            self._half_seconds = min(self._half_seconds, elapsed)

    def is_over(self, elapsed: float) -> bool:
        """Tell if the round is over, with `reason` set."""
        if self._is_enough:
            self.reason = (
                f"no reply came before {self._config.clients_per_round} others had answered, as "
                "many as the round wants (strategy.over-selection)."
            )
        elif self._config.pace and elapsed > self._config.pace * self._half_seconds:
            self.reason = (
                f"no reply came within {self._config.pace:g} times the {self._half_seconds:.1f} s "
                "in which half of the round's clients had answered (strategy.pace)."
            )
        return bool(self.reason)
