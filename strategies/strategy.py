"""Declare an aggregation rule in one place: its keys, its facts, and the Flower strategy it runs.

A rule is a frozen dataclass that joins the settings of every strategy (clients a round, quorum,
deadlines) with its own. `register` gives it the name by which `strategy.name` calls it.

Equality (law 4): with density 1, every Linear in scope and a lossless codec, the result of each
rule is that of its Flower strategy on the same replies, to 1e-6, round after round. The order of
the replies and the spread of clients over nodes change no bit (law 6).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, dataclass_transform

from fedpet.config import StrategyConfig
from fedpet.config.ranges import check_stated
from fedpet.config.strategy_registry import add_rule

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy as FlowerStrategy

    from fedpet.config import TrainingConfig
    from fedpet.pet.tiers import Tier
    from fedpet.protocol.ledger import Ledger
    from fedpet.protocol.plan import Plan
    from fedpet.server.client_pool import ClientPool
    from fedpet.server.rounds import SparseStrategy

__all__ = ["Strategy", "register", "wrap"]

R = TypeVar("R", bound="type[Strategy]")


@dataclass(frozen=True, kw_only=True)
class Strategy(StrategyConfig):
    """Settings of a run's rounds, for a rule to extend.

    A subclass states its keys as fields whose types have ranges (`fedpet.config.ranges`), makes
    Flower's strategy in `flower_strategy`, and says where it departs from a plain mean:

        compares_replies      it must see one message a client, not their mean
        has_server_optimizer  it moves the values by more than the mean update
        replies_needed        it needs more than one usable reply
    """

    def bind(
        self, *, plan: Plan, tiers: Sequence[Tier], population: ClientPool, ledger: Ledger
    ) -> SparseStrategy:
        """Make the strategy that Flower's loop runs.

        Args:
            plan: What all clients agree on.
            tiers: What clients of each strength train, see `fedpet.pet.tiers.tiers_of`.
            population: Clients, and the nodes they live on.
            ledger: Counts bytes, refusals and seconds.
        """
        from fedpet.server.rounds import SparseStrategy

        return SparseStrategy(
            plan=plan, tiers=tiers, population=population, config=self, ledger=ledger
        )


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field,))
def register(name: str) -> Callable[[R], R]:
    """Register a rule by the name that `strategy.name` gives it.

    Do so before the experiment is read. The class becomes a frozen dataclass.

    Args:
        name: Lower case, as "fedavg".

    Raises:
        ValueError: Another rule has this name, or a number of this one states no range.

    Example:
        >>> import fedpet
        >>> from fedpet.config import Experiment
        >>> from fedpet.config.ranges import FromZero
        >>> @fedpet.strategies.register("damped")
        ... class Damped(fedpet.strategies.Strategy):
        ...     damping: FromZero = 0.5
        ...     def flower_strategy(self, training):
        ...         from flwr.serverapp.strategy import FedAvgM
        ...         return FedAvgM(server_learning_rate=1 - self.damping)
        >>> experiment = Experiment.from_tables({"strategy": {"name": "damped", "damping": 0.2}})
        >>> experiment.strategy == Damped(damping=0.2)
        True
    """

    def registered(rule: R) -> R:
        rule.__annotations__["name"] = str
        rule.name = name
        dataclass(frozen=True, kw_only=True)(rule)  # in place
        check_stated(rule)
        add_rule(name, rule)
        return rule

    return registered


def wrap(
    flower: type[FlowerStrategy], *, compares_replies: bool = False, **settings: Any
) -> Strategy:
    """Put fedpet's rounds in front of a Flower strategy class of your own.

    Flower's class aggregates; fedpet samples clients, codes and checks what is sent, and keeps the
    ledger. `configure_train` is called to tell the class the global values, and its messages are
    not sent; `configure_evaluate` and `aggregate_evaluate` are not called: the server evaluates.

    Args:
        flower: A `flwr.serverapp.strategy.Strategy`. It aggregates messages with the ArrayRecord
            "arrays" of one float32 array, (num_values,), and the MetricRecord "metrics" of
            "num-examples" and "train-loss".
        compares_replies: Give `aggregate_train` one message a client, in the order of the clients'
            names. False gives it one message with the mean weighted by rows.
        settings: Keys of every strategy (`clients_per_round`, `quorum`, ...); all others are
            arguments of the class.

    Returns:
        A strategy as those of this package. It has no table, so a run of it that is cut short
        cannot be resumed: `register` a rule for that.

    Raises:
        TypeError: The class takes no such argument.
        ConfigError: A key of every strategy has a bad value.

    Example:
        >>> import fedpet
        >>> from flwr.serverapp.strategy import FedAvgM
        >>> class Slow(FedAvgM):
        ...     pass
        >>> strategy = fedpet.strategies.wrap(Slow, server_learning_rate=0.5, clients_per_round=10)
        >>> strategy.name, strategy.clients_per_round
        ('slow', 10)
    """
    common = {name: settings.pop(name) for name in list(settings) if name in _COMMON}
    flower(**settings)  # what it does not take is refused now, not when the rounds begin
    return _Wrapped(
        **{"name": flower.__name__.lower(), **common},
        flower=flower,
        comparing=compares_replies,
        arguments=tuple(settings.items()),
    )


_COMMON = frozenset(StrategyConfig.__dataclass_fields__)


@dataclass(frozen=True, kw_only=True)
class _Wrapped(Strategy):
    """A strategy around a Flower class that is not registered."""

    flower: type[Any] = field(metadata={"is_key": False})
    comparing: bool = field(metadata={"is_key": False})
    arguments: tuple[tuple[str, Any], ...] = field(metadata={"is_key": False})

    @property
    def compares_replies(self) -> bool:  # type: ignore[override]  # a class attribute of others
        """Tell if the class sees one message a client."""
        return self.comparing

    def check_name(self) -> None:
        """Take any: the class is at hand."""

    def flower_strategy(self, training: TrainingConfig) -> FlowerStrategy:
        made: FlowerStrategy = self.flower(**dict(self.arguments))
        return made
