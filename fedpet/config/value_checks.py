"""Check the value of a key, and read entries such as "kind=number"."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping

from fedpet.config.module_kinds import known_kinds
from fedpet.errors import ConfigError

__all__ = ["check_choice", "complete_rates", "density_and_share", "did_you_mean", "rates_by_kind"]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a sentence that names the nearest known name, or "" where none is near.

    Example:
        >>> did_you_mean("densty", ["density", "rule"])
        " Did you mean 'density'?"
    """
    near = difflib.get_close_matches(name.replace("_", "-").lower(), list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def check_choice(name: str, value: str, allowed: Iterable[str]) -> None:
    """Refuse a value that is not among the allowed ones."""
    allowed = list(allowed)
    if value not in allowed:
        raise ConfigError(
            f"{name} must be one of {', '.join(allowed)}, got {value!r}."
            f"{did_you_mean(value, allowed)}"
        )


def density_and_share(entry: str) -> tuple[float, float]:
    """Read an entry of `mask.tiers`: "0.005=0.3" is (0.005, 0.3)."""
    density, _, share = entry.partition("=")
    try:
        numbers = float(density), float(share)
    except ValueError:
        numbers = 0.0, 0.0
    if not (0 < numbers[0] <= 1 and 0 <= numbers[1] <= 1):
        raise ConfigError(
            f"mask.tiers must hold entries such as '0.005=0.3', a density in (0, 1] and the share "
            f"of the clients that train it in [0, 1], got {entry!r}."
        )
    return numbers


def rates_by_kind(entries: Iterable[str], key: str) -> dict[str, float]:
    """Read entries "kind=rate".

    Args:
        entries: The value of `training.learning-rates` or `search.learning-rates`.
        key: Its name, for messages.

    Raises:
        ConfigError: An entry that does not read, a kind that does not exist, or one given twice.

    Example:
        >>> rates_by_kind(["head=0.01", "mask = 0.002"], "training.learning-rates")
        {'head': 0.01, 'mask': 0.002}
    """
    rates: dict[str, float] = {}
    for entry in entries:
        name, _, text = entry.partition("=")
        kind = name.strip()
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 < value < math.inf:
            raise ConfigError(
                f"{key} must hold entries such as 'head=0.01', a kind of module and a finite rate "
                f"above 0, got {entry!r}."
            )
        _check_kind(kind, entry, key)
        if kind in rates:
            raise ConfigError(f"{key} names the kind {kind!r} twice, in {entry!r} again: keep one.")
        rates[kind] = value
    return rates


def complete_rates(entries: Iterable[str], rates: Mapping[str, float], key: str) -> tuple[str, ...]:
    """Return entries "kind=rate" with those of `rates` added whose kind they do not name.

    Example:
        >>> complete_rates(["head=0.5"], {"mask": 0.02, "head": 0.01}, "training.learning-rates")
        ('head=0.5', 'mask=0.02')
    """
    entries = tuple(entries)
    named = rates_by_kind(entries, key)
    return (*entries, *(f"{kind}={r:g}" for kind, r in rates.items() if kind not in named))


def _check_kind(kind: str, entry: str, key: str) -> None:
    """Refuse a kind of module that no model has."""
    known = known_kinds()
    if kind not in known:
        raise ConfigError(
            f"{key} must name kinds of modules, which are {', '.join(known)}, got {entry!r}."
            f"{did_you_mean(kind, known)}"
        )
