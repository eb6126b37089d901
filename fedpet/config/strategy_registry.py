"""Register aggregation rules by name, and read the [strategy] table of an experiment.

A rule is one class, see `strategies/`: its fields are the keys that it takes, with defaults and
ranges, and its attributes say what other stages must know of it. The shipped rules register
themselves when the first experiment is read; one of the user's own must do so before that.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from fedpet.config.value_checks import did_you_mean
from fedpet.errors import ConfigError

if TYPE_CHECKING:
    from fedpet.config.schema import StrategyConfig

__all__ = ["add_rule", "default_parameters", "registered_rules", "rule_named", "rule_of_table"]

SHIPPED = "fedpet.strategies"  # a later stage: imported by its name, as one of the user's own is
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
