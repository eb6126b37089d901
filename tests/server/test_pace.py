"""A round ends before its deadline where the strategy says so, and never where it does not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from in_process_run import run
from roll_call_runs import lines_of, node_of, on_nodes

from fedpet.config import StrategyConfig
from fedpet.errors import ConfigError
from fedpet.run.local_grid import LocalGrid
from fedpet.server.pace import Pace


def noted(config: StrategyConfig, sampled: int, *answers: tuple[float, int, int]) -> Pace:
    pace = Pace(config, sampled)
    for elapsed, answered, usable in answers:
        pace.note(elapsed=elapsed, num_answered=answered, num_usable=usable)
    return pace


def test_by_default_only_the_deadline_ends_a_round() -> None:
    pace = noted(StrategyConfig(clients_per_round=2), 4, (1.0, 3, 3))
    assert not pace.is_over(1e9)
    assert Pace.num_drawn(StrategyConfig(clients_per_round=7)) == 7


def test_the_pace_is_that_of_the_faster_half() -> None:
    config = StrategyConfig(pace=3.0)
    assert not noted(config, 4, (1.0, 1, 1)).is_over(1e9)  # one of four says nothing yet
    pace = noted(config, 4, (1.0, 1, 1), (2.0, 2, 0), (5.0, 3, 1))
    assert (pace.is_over(6.0), pace.is_over(6.1)) == (False, True)
    assert "3 times the 2.0 s in which half" in pace.reason


def test_with_over_selection_a_round_ends_when_as_many_as_wanted_can_be_used() -> None:
    config = StrategyConfig(clients_per_round=10, over_selection=0.3)
    assert Pace.num_drawn(config) == 13
    assert not noted(config, 13, (1.0, 12, 9)).is_over(1e9)
    assert noted(config, 13, (1.0, 12, 10)).is_over(0.0)
    few = noted(config, 4, (1.0, 4, 4))  # there are no more
    assert few.is_over(0.0)


@pytest.mark.parametrize("pace", [0.5, 1.0])
def test_a_pace_that_would_leave_out_the_half_itself_is_refused(pace: float) -> None:
    with pytest.raises(ConfigError, match=r"strategy.pace must be 0 or above 1"):
        StrategyConfig(pace=pace)


class SlowGrid(LocalGrid):
    """A grid in which one node's train messages are answered so many pulls later."""

    def __init__(self, handlers: Any, slow: int, pulls: int) -> None:
        super().__init__(handlers)
        self._slow, self._pulls = slow, pulls
        self._waits: dict[str, int] = {}
        self.asked: list[tuple[int, str]] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = list(messages)
        ids = list(super().push_messages(sent))
        for number, message in zip(ids, sent, strict=True):
            self.asked.append((message.metadata.dst_node_id, message.metadata.message_type))
            if self.asked[-1] == (self._slow, "train"):
                self._waits[number] = self._pulls
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ready = []
        for number in message_ids:
            self._waits[number] = self._waits.get(number, 0) - 1
            if self._waits[number] < 0:
                ready.append(number)
        time.sleep(0.01)
        return super().pull_messages(ready)


def test_a_slow_node_holds_no_round_and_is_asked_again_when_it_is_done(
    experiment: Callable[..., Any], files: tuple[Path, Path]
) -> None:
    settings = on_nodes(
        experiment,
        clients_num_clients=3,
        strategy_num_rounds=4,
        strategy_clients_per_round=3,
        strategy_pace=1.5,
    )
    names = {1: "client 0", 2: "client 1", 3: "client 2"}
    handlers = {node: node_of(settings, files[1], [name]) for node, name in names.items()}
    grid = SlowGrid(handlers, slow=3, pulls=10**9)
    result = run(settings, grid)
    assert [entry["who"] for entry in result["refused"]] == ["client 2"]
    assert "in which half of the round's clients had answered" in result["refused"][0]["reason"]
    assert grid.asked.count((3, "train")) == 1  # it is not drawn while it is at work
    lines = [line for line in lines_of(settings) if line["round"]]
    assert [line["clients"] for line in lines] == [3, 2, 2, 2]
    assert all(line["aggregated"] for line in lines)


def test_over_selection_draws_more_and_takes_the_first(
    experiment: Callable[..., Any], files: tuple[Path, Path]
) -> None:
    settings = on_nodes(
        experiment,
        clients_num_clients=3,
        strategy_num_rounds=1,
        strategy_clients_per_round=2,
        strategy_over_selection=0.5,
        strategy_quorum=1.0,
    )
    names = {1: "client 0", 2: "client 1", 3: "client 2"}
    handlers = {node: node_of(settings, files[1], [name]) for node, name in names.items()}
    result = run(settings, SlowGrid(handlers, slow=3, pulls=10**9))
    [refused] = result["refused"]
    assert refused["who"] == "client 2"
    assert "(strategy.over-selection)" in refused["reason"]
    [line] = [line for line in lines_of(settings) if line["round"]]
    assert (line["clients"], line["replies"], line["aggregated"]) == (3, 2, True)
