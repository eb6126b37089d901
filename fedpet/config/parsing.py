"""Read the tables of an experiment, and the settings of `--set`, as stages.

Keys are in kebab-case or snake_case; each value takes its field's type (fedpet/config/schema.py).
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from fedpet.config.value_checks import did_you_mean
from fedpet.errors import ConfigError

__all__ = ["field_types", "read_stage", "refuse_unknown", "with_overrides"]


# The types of a dataclass's fields by name, their ranges left out.
field_types: Callable[[type], Mapping[str, Any]] = cache(get_type_hints)


def refuse_unknown(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse the first name that is not known, and name those that are."""
    names = sorted(name.replace("_", "-") for name in known)
    for name in given:
        if name.replace("_", "-") not in names:
            raise ConfigError(
                f"unknown {what} {name!r}. Known are: {', '.join(names)}."
                f"{did_you_mean(name, names)}"
            )


def read_stage(config: type, stage: str, table: Mapping[str, Any]) -> Any:
    """Build a stage from its table.

    Raises:
        ConfigError: An unknown key (the known ones are named), or a bad value.
    """
    hints = field_types(config)
    is_key = {entry.name: entry.metadata.get("is_key", True) for entry in fields(config)}
    types = {name: hints[name] for name in is_key if is_key[name]}
    refuse_unknown(f"key in [{stage}]:", table, types)
    return config(
        **{
            key.replace("-", "_"): _typed(f"{stage}.{key}", value, types[key.replace("-", "_")])
            for key, value in table.items()
        }
    )


def _typed(name: str, value: Any, wanted: Any) -> Any:
    """Check one value against its field's type; ints pass as floats, strings as lists."""
    if get_origin(wanted) is tuple:
        assert get_args(wanted) == (str, ...)
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            return tuple(value)
        raise ConfigError(f"{name} must be a list of strings, got {value!r}.")
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return value  # the stage makes it a float
    if not isinstance(value, wanted) or (wanted is not bool and isinstance(value, bool)):
        quoted = f': put it in quotes, "{value}"' if wanted is str else ""
        raise ConfigError(
            f"{name} must be of type {getattr(wanted, '__name__', wanted)}, got {value!r}{quoted}."
        )
    return value


def with_overrides(
    tables: dict[str, Any], overrides: Iterable[str], stages: Mapping[str, type]
) -> dict[str, Any]:
    """Return the tables with `stage.key=value` strings laid over them, the last one on top.

    Args:
        tables: The tables of an experiment.
        overrides: The strings.
        stages: Name -> dataclass, whose fields say whether a value is text.
    """
    for override in overrides:
        key, equals, text = override.partition("=")
        stage, dot, name = key.strip().partition(".")
        if not (equals and dot and name):
            near = [
                f"{table}.{key.strip()}"
                for table, known in stages.items()
                if key.strip().replace("-", "_") in field_types(known)
            ]
            more = f" Did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"--set takes stage.key=value, got {override!r}.{more}")
        wanted = field_types(stages[stage]) if stage in stages else {}
        value = _read_value(text.strip(), wanted.get(name.replace("-", "_")))
        table = {k.replace("_", "-"): v for k, v in tables.get(stage, {}).items()}
        tables = {**tables, stage: {**table, name.replace("_", "-"): value}}
    return tables


def _read_value(text: str, wanted: Any) -> Any:
    """Parse a value as TOML; for a key that takes text, keep as written what is no TOML string.

    Example:
        >>> _read_value("01", str), _read_value("2024", str), _read_value("'a b'", str)
        ('01', '2024', 'a b')
        >>> _read_value("2024", int), _read_value("[neg, 1]", tuple[str, ...])
        (2024, ['neg', '1'])
    """
    try:
        parsed = tomllib.loads(f"value = {text}")
        value = parsed["value"] if len(parsed) == 1 else text
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    if get_origin(wanted) is tuple:
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            return value
        if text.startswith("[") and text.endswith("]"):  # a shell took the quotes away
            return [part.strip().strip("\"'") for part in text[1:-1].split(",") if part.strip()]
    elif wanted is not str:
        return value
    return value if isinstance(value, str) else text
