"""Define the base of all aggregation rules, register them, and read the table [strategy].

A rule is one class, see `strategies/`: its fields are the keys that it takes, with defaults and
ranges, and its attributes say what other stages must know of it. The shipped rules register
themselves when the first experiment is read; one of the user's own must do so before that.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any

from fedpet.config.ranges import Count, FromZero, Positive, Range, Stage, kebab_case
from fedpet.config.schema import TrainingConfig
from fedpet.config.value_checks import check_choice, did_you_mean
from fedpet.errors import ConfigError

__all__ = [
    "StrategyConfig",
    "UnregisteredStrategy",
    "add_rule",
    "default_parameters",
    "registered_rules",
    "rule_named",
    "rule_of_table",
]

SHIPPED = "fedpet.strategies"  # a later stage: imported by its name, as one of the user's own is
_SHARE = "It is the largest fraction of the average that one client may be."
_QUORUM = "It is the fraction of a round's clients that must give a usable reply."
Share = Annotated[float, Range(0, 1, above=True, advice=_SHARE)]
Quorum = Annotated[float, Range(0, 1, advice=_QUORUM)]


@dataclass(frozen=True, kw_only=True)
class StrategyConfig(Stage):
    name: str = "fedavg"  # of the aggregation rule; the rules stand in strategies/
    num_rounds: Count = 10  # of training
    clients_per_round: Count = 20  # drawn anew for each; all there are, where they are fewer
    quorum: Quorum = 0.5  # fraction of the round's clients that must give a usable reply
    min_replies: Count = 1  # usable ones, below which a round changes nothing
    round_deadline_seconds: Positive = 3600.0  # replies that come later are refused
    over_selection: FromZero = 0.0  # clients drawn beyond clients-per-round, a fraction of it; the
    # round ends when clients-per-round have answered (fedpet/server/pace.py)
    pace: FromZero = 0.0  # above 1: a round ends after so many times what its faster half takes
    node_wait_seconds: FromZero = 300.0  # for the first node, and for a deployment's clients
    evaluate_every: Count = 1  # rounds; the last is always evaluated
    # Of clients in an average: "examples", which are rows, or label tokens of a language model;
    # "rows"; or "uniform".
    weights: str = "examples"
    max_share: Share = 1.0  # of one client in an average; what is above goes to the others

    # Facts of a rule, which its class states (they are no keys).
    table_name = "strategy"
    compares_replies = False  # sees a message a client, so all must send the same entries
    has_server_optimizer = False  # moves the values by more than the mean update

    def __new__(cls, **fields: Any) -> StrategyConfig:
        """Make the class of the rule that is named: `StrategyConfig(name="krum")` is a `Krum`."""
        if cls is StrategyConfig:
            cls = rule_named(fields.get("name", "fedavg"))
        return object.__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_name()
        if 0 < self.pace <= 1:
            raise ConfigError(
                f"strategy.pace must be 0 or above 1, got {self.pace!r}. It is how many times as "
                "long as its faster half a round may take: 2 is twice as long, 0 sets no such end."
            )
        check_choice("strategy.weights", self.weights, ("examples", "rows", "uniform"))
        if self.clients_per_round < self.min_usable_replies:
            raise ConfigError(
                f"strategy {self.name!r} with these parameters, and min-replies, need "
                f"{self.min_usable_replies} usable replies a round, and "
                f"strategy.clients-per-round is "
                f"{self.clients_per_round}: raise it."
            )

    def check_name(self) -> None:
        """Refuse a name that is another rule's."""
        if not isinstance(self, rule_named(self.name)):
            raise ConfigError(
                f"{type(self).__name__} is the strategy {type(self).name!r}, got the name "
                f"{self.name!r}: leave it out."
            )

    @property
    def replies_needed(self) -> int:
        """Usable replies without which the rule does not mean what it says."""
        return 1

    @property
    def min_usable_replies(self) -> int:
        """Usable replies below which a round changes nothing, however small the quorum."""
        return max(self.replies_needed, self.min_replies)

    def num_averaged(self, num_replies: int) -> int:
        """Return of how many updates the rule takes the mean, or something as quiet."""
        return num_replies

    def with_training(self, training: TrainingConfig) -> tuple[StrategyConfig, TrainingConfig]:
        """Return both as the rule has them in one experiment.

        Raises:
            ConfigError: The rule does not go with these training settings.
        """
        return self, training

    def flower_strategy(self, training: TrainingConfig) -> Any:
        """Make Flower's strategy of this rule: a `flwr.serverapp.strategy.Strategy`."""
        raise NotImplementedError(f"{type(self).__name__} names no strategy of Flower's.")

    @classmethod
    def parameters(cls) -> dict[str, Any]:
        """Return the keys that this rule takes beside those of every rule, with their defaults."""
        common = {entry.name for entry in fields(StrategyConfig)}
        return {
            entry.name: entry.default
            for entry in fields(cls)
            if entry.name not in common and entry.metadata.get("is_key", True)
        }

    def to_table(self) -> dict[str, Any]:
        """Return all keys, those of other rules with their defaults."""
        keys = [entry.name for entry in fields(StrategyConfig)]
        own = {name: getattr(self, name) for name in (*keys, *self.parameters())}
        return kebab_case({**dict.fromkeys(keys), **default_parameters(), **own})


@dataclass(frozen=True, kw_only=True)
class UnregisteredStrategy(StrategyConfig):
    """Stand for the rule of a finished run that no class here has the name of; it runs nothing."""

    def check_name(self) -> None:
        """Take any."""


_rules: dict[str, type[StrategyConfig]] = {}


def add_rule(name: str, rule: type[StrategyConfig]) -> None:
    """Register a rule; the same class may come again, as where a module is loaded anew.

    Raises:
        ValueError: Another rule has this name.
    """
    known = _rules.setdefault(name, rule)
    if (known.__module__, known.__qualname__) != (rule.__module__, rule.__qualname__):
        raise ValueError(
            f"the strategy name {name!r} is that of {known.__module__}.{known.__qualname__}: "
            "register another name."
        )
    _rules[name] = rule


def registered_rules() -> Mapping[str, type[StrategyConfig]]:
    """Return the rules by name, the shipped ones first."""
    importlib.import_module(SHIPPED)
    return _rules


def rule_named(name: Any) -> type[StrategyConfig]:
    """Return the class of a rule.

    Raises:
        ConfigError: No rule has this name.
    """
    rules = registered_rules()
    if name not in rules:
        raise ConfigError(
            f"strategy.name must be one of {', '.join(rules)}, got {name!r}."
            f"{did_you_mean(str(name), rules)}"
        )
    return rules[name]


def default_parameters() -> dict[str, Any]:
    """Return every parameter of the shipped rules with its default."""
    found: dict[str, Any] = {}
    for rule in registered_rules().values():
        if rule.__module__.startswith(SHIPPED):
            for name, default in rule.parameters().items():
                found.setdefault(name, default)
    return found


def rule_of_table(
    table: Mapping[str, Any],
) -> tuple[type[StrategyConfig], dict[str, Any]]:
    """Return the rule that a [strategy] table names, and the table's keys that are the rule's.

    A parameter of another rule may stand in the table with its default, as in an experiment that
    was written with all keys.

    Raises:
        ConfigError: The name is unknown, or another rule's parameter has a value of its own.
    """
    rule = rule_named(table.get("name", "fedavg"))
    own = {field.name for field in fields(rule)}
    kept = {}
    for key, value in table.items():
        parameter = key.replace("-", "_")
        takers = {
            name: defaults[parameter]
            for name, other in registered_rules().items()
            if parameter in (defaults := other.parameters())
        }
        if parameter in own or not takers:
            kept[key] = value
        elif value not in takers.values():
            raise ConfigError(
                f"strategy {rule.name!r} takes no {key.replace('_', '-')}, got {value!r}: it "
                f"belongs to {', '.join(takers)}."
            )
    return rule, kept
