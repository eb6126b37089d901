"""Put values in the place of a module's own for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["replaced"]


@contextmanager
def replaced(module: Any, **ours: Any) -> Iterator[None]:
    """Put values in the place of a module's own, and take them back at the end."""
    before = {name: vars(module)[name] for name in ours}
    vars(module).update(ours)
    try:
        yield
    finally:
        vars(module).update(before)
