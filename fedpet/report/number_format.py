"""Format counts, shares, ratios and settings for a report.

Bytes and seconds: `fedpet.utils.formatting`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def show_count(count: float) -> str:
    """Format a count exactly up to a million, with three significant digits above.

    Example:
        >>> show_count(9986), show_count(22_713_216)
        ('9,986', '22.7 M')
    """
    if count < 999_950:
        return f"{count:,.0f}"
    for unit, size in (("M", 1e6), ("G", 1e9)):
        if count < 999.5 * size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e12:,.3g} T"


def show_ratio(ratio: float) -> str:
    """Format a ratio as "1/N", as one speaks of a saving.

    Example:
        >>> show_ratio(0.0005), show_ratio(0.4), show_ratio(2)
        ('1/2,000', '1/2.5', '2 x')
    """
    if ratio <= 0:
        return "0"
    if ratio >= 0.995:
        return "1" if ratio < 1.005 else f"{_short(ratio)} x"
    return f"1/{_short(1 / ratio)}"


def show_percent(fraction: float) -> str:
    """Format a fraction in percent, with three significant digits.

    Example:
        >>> show_percent(0.9912), show_percent(0.00044)
        ('99.1 %', '0.0440 %')
    """
    percent = 100 * fraction
    if percent == 0:
        return "0 %"
    return f"{percent:.1f} %" if abs(percent) >= 9.995 else f"{percent:#.3g} %"


FEW_CLASSES = 6  # whose shares are all shown


def show_predicted(shares: Mapping[str, float]) -> str:
    """Format how often each class is predicted; of many classes, the number that is.

    Example:
        >>> show_predicted({"bad": 0.25, "good": 0.75})
        'bad 25.0 %, good 75.0 %'
    """
    if len(shares) <= FEW_CLASSES:
        return ", ".join(f"{name} {show_percent(share)}" for name, share in shares.items())
    used = sum(share > 0 for share in shares.values())
    most = max(shares, key=lambda name: shares[name])
    return f"{used} of {len(shares)} classes, {most} {show_percent(shares[most])} at most"


def show_baseline(quality: Mapping[str, Any]) -> str:
    """Format the majority baseline and its answer.

    Example:
        >>> show_baseline({"majority_baseline": 0.5, "majority_class": "good"})
        "0.5000 (always 'good')"
    """
    answer = quality["majority_class"]
    known = f"always {answer!r}" if answer else "one value for every row"
    return f"{quality['majority_baseline']:.4f} ({known})"


def show_metric(value: float | None) -> str:
    """Format a metric; null in a result's file stands for NaN, which JSON cannot hold.

    Example:
        >>> show_metric(0.81234), show_metric(None)
        ('0.8123', 'nan')
    """
    return "nan" if value is None else f"{value:.4f}"


def show_value(value: object) -> str:
    """Format a setting as a TOML file has it, without the quotes."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.3g}"
