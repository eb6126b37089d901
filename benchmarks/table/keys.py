"""The keys of a table file: taken one by one, and whatever nobody took is refused.

In:  a TOML file.
Out: `Keys`, of its top and of its tables.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedpet.errors import ConfigError


class Keys:
    """A table whose keys are taken one by one; what is left at the end is unknown."""

    def __init__(self, where: str, table: Mapping[str, Any]) -> None:
        self._where = where
        self._left = dict(table)
        self._known: list[str] = []

    def take(self, key: str, kind: type, default: Any = None) -> Any:
        self._known.append(key)
        value = self._left.pop(key, default)
        if value is None:
            raise ConfigError(f"{self._where} lacks the key {key!r}.")
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ConfigError(
                f"{self._where}: {key} must be of type {kind.__name__}, got {value!r}."
            )
        return value

    def refuse_others(self) -> None:
        for key in self._left:
            raise ConfigError(
                f"{self._where}: unknown key {key!r}. Known are: {', '.join(self._known)}."
            )


def read_keys(path: Path, *tables: str) -> tuple[Keys, list[Keys]]:
    """The keys of a file, and those of the `tables` that it must have.

    Raises:
        ConfigError: There is no such file, it is no TOML, or it lacks a table.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no table file {str(path)!r}.") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{str(path)!r} is not a readable TOML file: {error}.") from None
    top = Keys("the table file", content)
    return top, [Keys(f"[{name}]", top.take(name, dict)) for name in tables]


def strings(values: list[Any], where: str) -> tuple[str, ...]:
    """A list of overrides."""
    if not all(isinstance(value, str) for value in values):
        raise ConfigError(f"{where} must be a list of 'stage.key=value', got {values!r}.")
    return tuple(values)
