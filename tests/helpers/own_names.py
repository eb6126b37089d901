"""Registered losses and metrics of one test: pages and docstrings each register the same names."""

from __future__ import annotations

import pytest

from fedpet.training import loss, metrics


def begin_with_built_in_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what other tests have registered, and after this one what it does."""
    for callables in (loss.LOSSES, metrics.METRICS):
        known = callables._functions.items()
        own = {name: each for name, each in known if each.__module__.startswith("fedpet.")}
        monkeypatch.setattr(callables, "_functions", own)
