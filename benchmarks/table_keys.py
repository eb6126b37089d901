"""Take the keys of a table file one by one, and refuse the unknown ones that are left."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.rate import Rate
from fedpet.errors import ConfigError


class Keys:
    """Keys of one TOML table."""

    def __init__(self, where: str, table: Mapping[str, Any]) -> None:
        self._where = where
        self._left = dict(table)
        self._known: list[str] = []

    def __contains__(self, key: str) -> bool:
        return key in self._left

    def take(self, key: str, kind: type, default: Any = None) -> Any:
        """Return a key's value; refuse one of another type, or a missing one without a default."""
        self._known.append(key)
        value = self._left.pop(key, default)
        if value is None:
            raise ConfigError(f"{self._where} lacks the key {key!r}.")
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
            raise ConfigError(
                f"{self._where}: {key} must be of type {kind.__name__}, got {value!r}."
            )
        return value

    def refuse_others(self) -> None:
        """Refuse the keys that nobody took."""
        for key in self._left:
            raise ConfigError(
                f"{self._where}: unknown key {key!r}. Known are: {', '.join(self._known)}."
            )


def read_keys(path: Path) -> Keys:
    """Read a file.

    Raises:
        ConfigError: There is no such file, or it is no TOML.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no table file {str(path)!r}.") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{str(path)!r} is not a readable TOML file: {error}.") from None
    return Keys("the table file", content)


def rates_of(keys: Keys, where: str) -> tuple[Rate, ...]:
    """Take the key learning-rates, in rising order; () where there is none."""
    where = f"{where} learning-rates"
    rates = [Rate.parse(value, where) for value in keys.take("learning-rates", list, [])]
    if len(set(rates)) < len(rates):
        raise ConfigError(f"{where} must be distinct, got {[*map(str, rates)]}.")
    return tuple(sorted(rates))


def strings(values: list[Any], where: str) -> tuple[str, ...]:
    """Check a list of overrides."""
    if not all(isinstance(value, str) for value in values):
        raise ConfigError(f"{where} must be a list of 'stage.key=value', got {values!r}.")
    return tuple(values)
