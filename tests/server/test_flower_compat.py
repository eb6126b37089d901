"""Flower's private parts are touched in one folder."""

from __future__ import annotations

import ast
import gc
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord

from fedpet.protocol.flower_compat.flower_strategies import without_collections

PUBLIC = re.compile(r"flwr(\.(app|clientapp|simulation|serverapp(\.(strategy|exception))?))?")
COMPAT = Path("fedpet", "protocol", "flower_compat")


def sources(repository: Path) -> Iterator[Path]:
    for pattern in ("fedpet/**/*.py", "strategies/**/*.py", "simulations/*.py"):
        yield from repository.glob(pattern)


def private_parts(text: str) -> list[str]:
    """Return the modules of Flower that are not public, and attributes set behind its back."""
    found = re.findall(r"__dict__\[\"_\w+\"\] = |vars\(\w+\)\[.*\] = ", text)
    for node in ast.walk(ast.parse(text)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module]
        found += [n for n in names if n.split(".")[0] == "flwr" and not PUBLIC.fullmatch(n)]
        found += [n for n in names if n in ("flwr.app.message", "flwr.app.metadata")]
    return found


@pytest.mark.parametrize(
    "code",
    [
        'message.metadata.__dict__["_message_id"] = number',
        'vars(self)["current_arrays"] = None',
        "from flwr.supercore.task_identity import TaskIdentity",
        "import flwr.common.constant",
        "def f():\n    from flwr.simulation.ray_transport.ray_actor import BasicActorPool",
        "from flwr.app.message import make_message",
    ],
)
def test_the_check_sees_each_kind_of_private_part(code: str) -> None:
    assert private_parts(code)
    assert not private_parts("from flwr.serverapp.strategy import FedAvg; import flwr.app")


def test_no_other_file_touches_flower_s_private_parts(repository: Path) -> None:
    touched = {
        str(path.relative_to(repository)): parts
        for path in sources(repository)
        if path.parent != repository / COMPAT and (parts := private_parts(path.read_text("utf-8")))
    }
    assert touched == {}
    for path in (repository / COMPAT).glob("flower_*.py"):
        assert private_parts(path.read_text(encoding="utf-8")), path.stem


def test_flower_collects_no_garbage_within_an_aggregation_and_does_so_again_afterwards() -> None:
    collected: list[str] = []

    def note(phase: str, info: dict[str, int]) -> None:
        collected.append(phase)

    gc.callbacks.append(note)
    try:
        with without_collections():
            ArrayRecord([np.zeros(3)]).to_numpy_ndarrays(keep_input=False)
            during = len(collected)
        ArrayRecord([np.zeros(3)]).to_numpy_ndarrays(keep_input=False)
    finally:
        gc.callbacks.remove(note)
    assert during == 0 < len(collected)
