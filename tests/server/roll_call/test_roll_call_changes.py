"""Nodes come and go: clients are drawn from those that are there, and asked anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from in_process_run import Handler, run
from roll_call_runs import lines_of, three_nodes

from fedpet.protocol.request import read_request
from fedpet.run.local_grid import LocalGrid


class Changing(LocalGrid):
    """Nodes by the number of train messages sent so far."""

    def __init__(self, handlers: dict[int, Handler], there: Callable[[int], set[int]]) -> None:
        super().__init__(handlers)
        self.trained = 0
        self._there = there

    def get_node_ids(self) -> list[int]:
        return [node for node in super().get_node_ids() if node in self._there(self.trained)]

    def push_messages(self, messages: Any) -> Any:
        messages = list(messages)
        self.trained += sum(m.metadata.message_type == "train" for m in messages)
        return super().push_messages(messages)


def test_a_latecomer_s_clients_are_drawn_once_it_is_there(
    deployed: Any, files: tuple[Path, Path]
) -> None:
    settings = deployed(strategy_clients_per_round=6, strategy_num_rounds=4, clients_num_clients=4)
    nodes = three_nodes(settings, files[1])
    grid = Changing(nodes, lambda trained: {7, 5} if trained < 2 else {7, 5, 9})
    result = run(settings, grid)
    assert result["refused"] == []
    assert [line["clients"] for line in lines_of(settings)] == [0, 4, 6, 6, 6]
    assert result["data"]["clients"] == 6


def test_a_node_that_left_is_not_drawn_from_and_is_asked_anew_when_it_is_back(
    deployed: Any, files: tuple[Path, Path]
) -> None:
    settings = deployed(strategy_clients_per_round=6, strategy_num_rounds=3)
    asked: list[int] = []
    nodes = three_nodes(settings, files[1])
    honest = nodes[9]

    def counted(payload: bytes) -> bytes:
        asked.append(len(read_request(payload).clients))
        return honest(payload)

    nodes[9] = counted
    grid = Changing(nodes, lambda trained: {5, 7} if trained == 3 else {5, 7, 9})
    result = run(settings, grid)
    assert result["refused"] == []
    assert [line["clients"] for line in lines_of(settings)] == [0, 6, 4, 6]
    assert asked == [0, 2, 0, 2]


def test_a_run_goes_on_with_those_who_came_when_the_wait_is_over(
    deployed: Any, files: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    settings = deployed(strategy_node_wait_seconds=0.1, strategy_clients_per_round=6)
    nodes = {5: three_nodes(settings, files[1])[5]}
    assert run(settings, LocalGrid(nodes))["data"]["clients"] == 2
    assert "2 of 6 clients came within 0.1 seconds" in caplog.text


def test_a_device_that_was_started_anew_has_its_clients_again_once_the_old_node_is_gone(
    deployed: Any, files: tuple[Path, Path]
) -> None:
    """To a server that lets every node in, a device is another node after each start."""
    settings = deployed(strategy_clients_per_round=6, strategy_num_rounds=4, clients_num_clients=6)
    nodes = three_nodes(settings, files[1])
    nodes[12] = nodes[9]

    def there(trained: int) -> set[int]:
        if trained < 3:
            return {5, 7, 9}
        return {5, 7, 9, 12} if trained < 6 else {5, 7, 12}

    result = run(settings, Changing(nodes, there))
    assert [refused["who"] for refused in result["refused"]] == ["node 12", "node 12"]
    assert [line["replies"] for line in lines_of(settings)] == [0, 6, 6, 6, 6]
