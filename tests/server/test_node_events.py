"""Events of nodes stand in the books by the node's name: rounds.jsonl, result.json, the report."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from in_process_run import run
from roll_call_runs import (
    lines_of,
    meanwhile,
    node_of,
    on_nodes,
    put_key,
    rows_of,
    write_lines,
)
from tiny import Silent

from fedpet.config import Experiment
from fedpet.errors import ReplyError
from fedpet.protocol.registration import decode_registration
from fedpet.protocol.request import Request, write_request
from fedpet.report.loading import read_report
from fedpet.report.page import page
from fedpet.run.federate import prepare
from fedpet.run.local_grid import LocalGrid
from fedpet.server import node_registry


class NodesThatMove(LocalGrid):
    """Nodes whose keys, and whether they are there, are set from outside."""

    def __init__(self, handlers: dict[int, Any], keys: dict[int, bytes]) -> None:
        super().__init__(handlers)
        self.keys = keys
        self.starts = dict.fromkeys(handlers, "2026-01-01T00:00:00+00:00")

    def get_nodes(self) -> Any:
        return [
            SimpleNamespace(node_id=node, public_key=key, last_activated_at=self.starts[node])
            for node, key in self.keys.items()
        ]


@pytest.fixture
def here(
    experiment: Callable[..., Experiment],
    files: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Experiment, NodesThatMove, Path]:
    """Two nodes of a client each, and a third that waits for its turn with the first one's rows."""
    monkeypatch.setattr(node_registry, "FIRST_PAUSE", 0.0)
    folder = tmp_path / "keys"
    names = ["attic", "barn"]
    keys = {n + 1: put_key(folder, name, f'names = ["client {n}"]') for n, name in enumerate(names)}
    settings = on_nodes(
        experiment, clients_num_clients=2, strategy_num_rounds=5, strategy_quorum=0.1
    )
    settings = replace(settings, clients=replace(settings.clients, node_keys=str(folder)))
    homes = {1: "client 0", 2: "client 1", 3: "client 0"}
    handlers = {node: node_of(settings, files[1], [name]) for node, name in homes.items()}
    return settings, NodesThatMove(handlers, keys), folder


def events(settings: Experiment) -> list[tuple[int, str, str]]:
    result = json.loads((Path(settings.run.out) / "result.json").read_text(encoding="utf-8"))
    by_line = [
        (line["round"], event["node"], event["event"])
        for line in lines_of(settings)
        for event in line.get("events", ())
    ]
    assert by_line == [(e["round"], e["node"], e["event"]) for e in result["events"]]
    shown = page(read_report(Path(settings.run.out)))
    assert all(f"<td>{node}</td>" in shown and event in shown for _, node, event in by_line)
    return by_line


def test_an_undisturbed_run_has_no_events(here: Any) -> None:
    settings, grid, _ = here
    run(settings, grid)
    assert events(settings) == []
    assert all("events" not in line for line in lines_of(settings))


def test_rows_that_change_are_told_when_they_are_seen_and_when_they_count(here: Any) -> None:
    settings, grid, _ = here
    path = rows_of(settings, "client 1")
    lines = path.read_text(encoding="utf-8").splitlines()
    grid._handlers[2] = meanwhile(grid._handlers[2], {2: lambda: write_lines(path, lines * 2)})
    result = run(settings, grid)
    assert events(settings) == [(2, "barn", "rows changed"), (3, "barn", "registered again")]
    n = len(lines)
    assert result["events"][1]["details"] == f"1 client, {2 * n} rows, {n} before"


def test_a_node_that_is_started_again_between_two_looks_is_told_and_queried_anew(here: Any) -> None:
    settings, grid, _ = here
    path = rows_of(settings, "client 1")
    lines = path.read_text(encoding="utf-8").splitlines()

    def start_again() -> None:
        grid.starts[2] = "2026-01-01T00:01:00+00:00"
        write_lines(path, lines * 2)

    grid._handlers[1] = meanwhile(grid._handlers[1], {2: start_again})
    result = run(settings, grid)
    assert ("barn", "started again") in [(node, event) for _, node, event in events(settings)]
    assert ("barn", "registered again") in [(node, event) for _, node, event in events(settings)]
    assert result["refused"] == []


def test_a_node_that_cannot_take_part_and_comes_back_is_told_by_name(here: Any) -> None:
    settings, grid, _ = here
    path = rows_of(settings, "client 1")
    away = path.with_suffix(".away")
    grid._handlers[2] = meanwhile(grid._handlers[2], {2: lambda: path.rename(away)})
    grid._handlers[1] = meanwhile(grid._handlers[1], {3: lambda: away.rename(path)})
    run(settings, grid)
    told = events(settings)
    assert told[0] == (2, "barn", "suspended")
    assert told[-1][1:] == ("barn", "registered")
    assert {node for _, node, _ in told} == {"barn"}


def test_a_key_that_is_replaced_is_told_beside_the_node_that_goes_and_comes(here: Any) -> None:
    settings, grid, folder = here

    def rotate() -> None:
        (folder / "attic.pub").unlink()
        new = put_key(folder, "attic", 'names = ["client 0"]')
        grid.keys = {2: grid.keys[2], 3: new}  # under another of Flower's numbers

    grid._handlers[2] = meanwhile(grid._handlers[2], {2: rotate})
    result = run(settings, grid)
    assert result["refused"] == []
    assert events(settings) == [
        (3, "attic", "key replaced"),
        (3, "attic", "disconnected"),
        (3, "attic", "registered"),
    ]


def test_a_node_that_goes_and_one_whose_key_is_withdrawn_are_told(here: Any) -> None:
    settings, grid, folder = here

    def go() -> None:
        del grid.keys[1]

    def withdraw() -> None:
        (folder / "attic.pub").unlink()

    grid._handlers[2] = meanwhile(grid._handlers[2], {1: go, 3: withdraw})
    run(settings, grid)
    assert events(settings) == [(2, "attic", "disconnected"), (4, "attic", "key withdrawn")]


def test_a_node_does_not_register_while_its_disk_is_full(
    files: tuple[Path, Path], experiment: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stored the plan before, so nothing else of a registration would be written."""
    from fedpet.client import plan_store

    settings = on_nodes(experiment)
    node = node_of(settings, files[1], ["client 0"])
    plan = prepare(settings, Silent()).plan.to_bytes()
    query = write_request(Request((), b"", plan))
    assert decode_registration(node(query)).num_rows
    honest = plan_store.atomic_write

    def full(path: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(plan_store, "atomic_write", full)
    with pytest.raises(ReplyError, match="No space left on device"):
        decode_registration(node(query))
    monkeypatch.setattr(plan_store, "atomic_write", honest)
    assert decode_registration(node(query)).num_rows
