"""Registered names of one test: pages and docstrings each register the same ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fedpet.config import strategy_registry
from fedpet.data import collator
from fedpet.pet.modules import registry
from fedpet.training import loss, metrics


@contextmanager
def built_in_names() -> Iterator[None]:
    """Forget what other tests have registered, and at the end what this one does."""
    strategy_registry.registered_rules()  # the shipped ones register themselves here
    kinds = {kind for kind, facts in registry.KINDS.items() if _builds_ours(facts)}
    tables: list[tuple[dict[str, Any], Any]] = [
        (strategy_registry._rules, _is_ours),
        (loss.LOSSES._functions, _is_ours),
        (metrics.METRICS._functions, _is_ours),
        (collator.COLLATORS._functions, _is_ours),
        (registry.KINDS, _builds_ours),
        (registry.PRESETS, lambda preset: preset[0] in kinds),
    ]
    before = [dict(table) for table, _ in tables]
    for table, is_ours in tables:
        for name in [name for name, one in table.items() if not is_ours(one)]:
            del table[name]
    try:
        yield
    finally:
        for (table, _), content in zip(tables, before, strict=True):
            table.clear()
            table.update(content)


def _is_ours(one: Any) -> bool:
    return one.__module__.startswith("fedpet.")


def _builds_ours(facts: registry.ModuleKind) -> bool:
    return _is_ours(facts.build.__self__)  # type: ignore[attr-defined]  # a bound class method
