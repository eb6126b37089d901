"""Read a point of a grid: a learning rate, and those of kinds of module that differ from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedpet.errors import ConfigError


@dataclass(frozen=True, order=True)
class Rate:
    """Hold learning rates, written `0.001` or `"0.001 head=0.01"`. Sorts by size."""

    learning_rate: float
    by_kind: tuple[str, ...] = ()

    @classmethod
    def parse(cls, value: Any, where: str) -> Rate:
        """Read a number or a string.

        Raises:
            ConfigError: It is neither, or the rate is not above 0.
        """
        first, *others = str(value).split() or [""]
        try:
            rate = float(first)
        except ValueError:
            rate = 0.0
        if not rate > 0 or isinstance(value, bool) or not all("=" in other for other in others):
            raise ConfigError(
                f"{where} must hold learning rates such as 0.001 or '0.001 head=0.01', got "
                f"{value!r}."
            )
        return cls(rate, tuple(others))

    def __str__(self) -> str:
        return " ".join((f"{self.learning_rate:g}", *self.by_kind))

    @property
    def file_name(self) -> str:
        """Return the rate as part of a file's name: `0.001-head0.01`."""
        return str(self).replace(" ", "-").replace("=", "")
