"""State which numbers a key may have, in the field's own type, and check all of them at once.

A stage writes `clip_norm: FromZero = 1.0`; `Stage` reads the range off the annotation. A number
without a stated range is refused by a test, and NaN and infinity lie in no range.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from fedpet.errors import ConfigError

__all__ = [
    "AnyInteger",
    "Count",
    "FromZero",
    "Positive",
    "Range",
    "Stage",
    "Whole",
    "check_stated",
    "kebab_case",
    "stated_ranges",
]


@dataclass(frozen=True)
class Range:
    """The finite numbers between two limits.

    Attributes:
        least: The lower limit.
        most: The upper limit.
        above: The lower limit itself lies outside.
        below: The upper limit itself lies outside.
        zero: 0 is allowed beside the range: it stands for "off".
        advice: What to do instead, in a sentence.
    """

    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    below: bool = False
    zero: bool = False
    advice: str = ""

    def __contains__(self, value: float) -> bool:
        if isinstance(value, float) and not math.isfinite(value):
            return False
        if self.zero and value == 0:
            return True
        low = value > self.least if self.above else value >= self.least
        return low and (value < self.most if self.below else value <= self.most)

    def __str__(self) -> str:
        if self.most < math.inf:
            first, last = "(" if self.above else "[", ")" if self.below else "]"
            text = f"in {first}{self.least:g}, {self.most:g}{last}"
        elif self.least > -math.inf:
            text = f"{'above' if self.above else 'at least'} {self.least:g}"
        else:
            text = "a number"
        return f"0, or {text}" if self.zero else text


AnyInteger = Annotated[int, Range()]  # of seeds that are hashed
Count = Annotated[int, Range(1)]
Whole = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, above=True)]
FromZero = Annotated[float, Range(0)]


class Stage:
    """A table of an experiment, named as its class is: `TrainingConfig` is [training].

    Numbers become Python's own, whatever their type was (numpy's, say), and are checked against
    the ranges of their fields.
    """

    table_name = ""  # where the class is named otherwise

    def to_table(self) -> dict[str, Any]:
        """Return the keys, in kebab-case, with their values."""
        return kebab_case(dataclasses.asdict(self))  # type: ignore[call-overload]  # no dataclass

    def __post_init__(self) -> None:
        table = self.table_name or type(self).__name__.removesuffix("Config").lower()
        stated = stated_ranges(type(self))  # type: ignore[arg-type]  # mypy hashes an instance
        for field, (kinds, allowed) in stated.items():
            value = getattr(self, field)
            if str in kinds and isinstance(value, str):
                continue
            key = f"{table}.{field.replace('_', '-')}"
            object.__setattr__(self, field, _checked(key, value, kinds, allowed))


def kebab_case(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table as TOML has it: kebab-case keys, and lists."""
    return {
        name.replace("_", "-"): list(value) if isinstance(value, tuple) else value
        for name, value in fields.items()
    }


@cache
def stated_ranges(stage: type[Any]) -> Mapping[str, tuple[tuple[type, ...], Range | None]]:
    """Return the fields of a stage that may hold a number: types, and the range or None."""
    found = {}
    hints = get_type_hints(stage, include_extras=True)
    for field in dataclasses.fields(stage):
        kinds, extras = _taken_apart(hints[field.name])
        if {int, float} & set(kinds):
            found[field.name] = (kinds, next((e for e in extras if isinstance(e, Range)), None))
    return found


def check_stated(stage: type[Any]) -> None:
    """Refuse a class one of whose numbers states no range.

    Raises:
        ValueError: It names the field, and a type that would do.
    """
    for field, (_, allowed) in stated_ranges(stage).items():  # type: ignore[arg-type]  # as above
        if allowed is None:
            raise ValueError(
                f"{stage.__name__}.{field} is a number and states no range: give it a type such "
                "as fedpet.config.ranges.FromZero."
            )


def _taken_apart(hint: Any) -> tuple[tuple[type, ...], tuple[Any, ...]]:
    """Return the types of a hint, and what `Annotated` adds."""
    extras: tuple[Any, ...] = ()
    if get_origin(hint) is Annotated:
        hint, *more = get_args(hint)
        extras = tuple(more)
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return parts, extras


def _checked(key: str, value: Any, kinds: tuple[type, ...], allowed: Range | None) -> int | float:
    """Return the value as Python's own number, in its range."""
    assert allowed is not None, f"{key} states no range"
    whole, is_number = isinstance(value, Integral), isinstance(value, Real)
    if isinstance(value, bool) or not is_number or not (whole or float in kinds):
        wanted = "a number" if float in kinds else "a whole number"
        raise ConfigError(f"{key} must be {wanted}, got {value!r}.")
    try:
        number = int(value) if whole and int in kinds else float(value)
    except OverflowError:  # a whole number beyond the largest float
        number = math.inf
    if number in allowed:
        return number
    finite = "" if math.isfinite(number) or allowed.most < math.inf else " and finite"
    advice = f" {allowed.advice}" if allowed.advice else ""
    raise ConfigError(f"{key} must be {allowed}{finite}, got {number!r}.{advice}")
