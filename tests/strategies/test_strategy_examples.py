"""The examples in the docstrings of the strategies run."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
from own_names import built_in_names

import fedpet

RULES = [name for name in fedpet.strategies.__all__ if name not in ("Strategy", "StructureSearch")]


@pytest.mark.parametrize("name", RULES)
def test_every_public_strategy_has_an_example_that_gives_what_it_says(name: str) -> None:
    known: dict[str, Any] = {name: getattr(fedpet.strategies, name) for name in RULES}
    known["__name__"] = "example"  # of the module in which an example registers a rule
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    [example] = doctest.DocTestFinder(recurse=False).find(known[name], name, globs=known)
    with built_in_names():
        runner.run(example)
    assert runner.failures == 0
    assert runner.tries > 0
