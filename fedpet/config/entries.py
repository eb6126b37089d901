"""What the value of a key may be, and how an entry such as "kind=number" is read.

In:  the name of a key as a user writes it, its value.
Out: what it means, or one sentence on what is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable

from fedpet.errors import ConfigError

__all__ = ["check_at_least", "check_choice", "density_and_share", "rate_of_kind"]


def check_choice(name: str, value: str, allowed: Iterable[str]) -> None:
    """Refuse what is not one of these."""
    allowed = list(allowed)
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")


def density_and_share(entry: str) -> tuple[float, float]:
    """Of one of `mask.tiers`: "0.005=0.3" is (0.005, 0.3)."""
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


def check_at_least(name: str, value: float, least: float) -> None:
    """Refuse what is less, and what is no number."""
    if not value >= least:
        raise ConfigError(f"{name} must be at least {least}, got {value!r}.")


def rate_of_kind(kind: str, rate: float, by_kind: Iterable[str], key: str) -> float:
    """`rate`, or that of the entry "kind=rate"; entries before it are checked, all if none is."""
    for entry in by_kind:
        name, _, text = entry.partition("=")
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not value > 0:
            raise ConfigError(f"{key} must hold entries such as 'head=0.01', got {entry!r}.")
        if name.strip() == kind:
            return value
    return rate
