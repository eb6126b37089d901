"""Every example in the docstrings of models, training and search is run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import numpy as np
import pytest
import torch
from own_names import built_in_names

import fedpet
import fedpet.pet
import fedpet.search
import fedpet.training
import fedpet.utils.named_callables
from fedpet.data import Task


def modules() -> list[str]:
    packages = (fedpet.pet, fedpet.search, fedpet.training)
    return [
        module.name
        for package in packages
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    ]


@pytest.mark.parametrize("name", modules())
def test_every_example_gives_what_it_says(name: str) -> None:
    module = importlib.import_module(name)
    public = {one: getattr(fedpet, one) for one in fedpet.__all__}
    known = {"np": np, "torch": torch, "Task": Task} | public | vars(module)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    with built_in_names():
        for example in doctest.DocTestFinder(recurse=True).find(module, name, globs=known):
            runner.run(example)
    assert runner.failures == 0


def test_every_public_function_of_the_search_has_an_example() -> None:
    own = {"hypergradient", "virtual_step"}  # tested against autograd; an example would be a page
    of_a_run = {"run_search", "split_rows", "step_batches", "split_in_two", "client_config",
                "candidate_records"}  # fmt: skip
    for name in set(fedpet.search.__all__) - own - of_a_run:
        if inspect.isfunction(one := getattr(fedpet.search, name)):
            assert ">>>" in (one.__doc__ or ""), name
