"""Format byte counts and durations for people. MB is 10^6 bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def format_bytes(count: float) -> str:
    """Format a byte count with three significant digits.

    Example:
        >>> format_bytes(40643)
        '40.6 kB'
    """
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} TB" if value < 999.5 else f"{value:,.0f} TB"


def show_seconds(seconds: float) -> str:
    """Format a duration in its two largest units.

    Example:
        >>> show_seconds(192)
        '3 min 12 s'
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def show_duration(seconds: float) -> str:
    """Format a duration from milliseconds to years in one unit with three significant digits.

    Example:
        >>> show_duration(0.0421), show_duration(73.8), show_duration(55_829)
        ('42.1 ms', '1.23 min', '15.5 h')
    """
    value = 1000 * seconds
    for unit, size in (("ms", 1000.0), ("s", 60.0), ("min", 60.0), ("h", 48.0), ("days", 730.5)):
        if value < size * 0.9995:
            return f"{value:.3g} {unit}"
        value /= 24 if unit == "h" else 365.25 if unit == "days" else size
    return f"{value:,.3g} years" if value < 999.5 else f"{value:,.0f} years"


def show_spread(spread: Mapping[str, Any]) -> str:
    """Say a spread in a few words, for a terminal.

    Example:
        >>> show_spread({"clients": 12, "row_mean": 0.81, "worst_decile": 0.5})
        '0.8100, worst tenth 0.5000 (12 clients)'
    """
    if "row_mean" not in spread:
        return f"no finite value of {spread.get('not_finite', 0)} clients"
    return (
        f"{spread['row_mean']:.4f}, worst tenth {spread['worst_decile']:.4f} "
        f"({spread['clients']:,} client{'s' * (spread['clients'] != 1)})"
    )
