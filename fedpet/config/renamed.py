"""Refuse the former names of tables, keys and values, and read files that have them.

An experiment with a former name is refused with the present one. Reports read runs of before:
`with_new_names` gives their tables the present names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fedpet.errors import ConfigError

__all__ = ["new_setting", "refuse_former_names", "with_new_names"]

TABLES = {"population": "clients"}
KEYS = {
    "clients.alpha": "clients.dirichlet-alpha",
    "codec.up": "codec.uplink",
    "codec.down": "codec.downlink",
    "codec.head-up": "codec.head-uplink",
    "codec.head-down": "codec.head-downlink",
    "search.rate": "search.learning-rate",
    "search.rates": "search.learning-rates",
    "search.alpha-rate": "search.gate-learning-rate",
    "training.first-token-only": "training.cls-only",
    "training.products": "training.matmul-backend",
}
# By the former key and value; `codec.downlink` itself is the name of another key by now.
VALUES = {
    ("backbone.model", "embedded"): ("backbone.model", "bundled"),
    ("data.source", "embedded"): ("data.source", "bundled"),
    ("mask.broadcast", "derived"): ("mask.broadcast", "recompute"),
    ("mask.broadcast", "explicit"): ("mask.broadcast", "send"),
    ("codec.downlink", "changes"): ("codec.downlink-mode", "delta"),
    ("codec.downlink", "values"): ("codec.downlink-mode", "full"),
}


def new_setting(key: str, value: Any) -> tuple[str, Any]:
    """Return the present key and value of a setting.

    Args:
        key: Dotted, in kebab-case.
        value: As the file has it.

    Example:
        >>> new_setting("population.alpha", 0.3), new_setting("codec.downlink", "values")
        (('clients.dirichlet-alpha', 0.3), ('codec.downlink-mode', 'full'))
    """
    table, _, name = key.partition(".")
    key = f"{TABLES.get(table, table)}.{name}"
    key = KEYS.get(key, key)
    return VALUES.get((key, value), (key, value)) if isinstance(value, str) else (key, value)


def with_new_names(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return an experiment's tables with the present names; what is no table stays as it is."""
    found: dict[str, Any] = {}
    for table, content in tables.items():
        if not isinstance(content, Mapping):
            found[table] = content
            continue
        found.setdefault(TABLES.get(table, table), {})
        for name, value in content.items():
            new, value = new_setting(f"{table}.{name.replace('_', '-')}", value)
            stage, _, key = new.partition(".")
            found.setdefault(stage, {})[key] = value
    return found


def refuse_former_names(tables: Mapping[str, Any]) -> None:
    """Refuse the first former name in an experiment's tables.

    Raises:
        ConfigError: It says the present name.
    """
    for before, now in _former(tables):
        raise ConfigError(f"{before} has another name now: write {now}.")


def _former(tables: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for table, content in tables.items():
        if table in TABLES:
            first = next(iter(content), "") if isinstance(content, Mapping) else ""
            key, _ = new_setting(f"{table}.{first.replace('_', '-')}", "")
            more = f", and {table}.{first} is {key}" if first else ""
            yield f"the table [{table}]", f"[{TABLES[table]}]{more}"
        for name, value in content.items() if isinstance(content, Mapping) else ():
            before = f"{table}.{name.replace('_', '-')}"
            key, new = new_setting(before, value)
            if new is not value:
                yield f"{before} = {value!r}", f"{key} = {new!r}"
            elif key != before:
                yield before, key
