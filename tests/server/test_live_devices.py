"""Devices live: rows come and go, checkpoints and files are mended, and the run goes on."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from in_process_run import Handler, run
from roll_call_runs import lines_of, meanwhile, node_of, on_nodes, rows_of, write_lines
from tiny import make_backbone

from fedpet.config import Experiment
from fedpet.protocol.request import read_request
from fedpet.run.local_grid import LocalGrid
from fedpet.server import node_registry


@pytest.fixture
def deployed(experiment: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Experiment]:
    monkeypatch.setattr(node_registry, "FIRST_PAUSE", 0.0)

    def make(**changes: Any) -> Experiment:
        given = {"clients_num_clients": 2, "strategy_num_rounds": 4, "strategy_quorum": 0.1}
        return on_nodes(experiment, **{**given, **changes})

    return make


def two_nodes(settings: Experiment, rows: Path, **config: Any) -> dict[int, Handler]:
    return {
        1: node_of(settings, rows, ["client 0"]),
        2: node_of(settings, rows, ["client 1"], **config),
    }


def weights(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int]]:
    """The weights of each round's updates, as they are folded."""
    from fedpet.server.aggregation import MeanFold

    found: list[dict[str, int]] = []
    begin, add = MeanFold.__init__, MeanFold.add

    def counted_begin(fold: Any, *args: Any) -> None:
        begin(fold, *args)
        found.append({})

    def counted_add(fold: Any, update: Any) -> None:
        found[-1][update.name] = update.weight
        add(fold, update)

    monkeypatch.setattr(MeanFold, "__init__", counted_begin)
    monkeypatch.setattr(MeanFold, "add", counted_add)
    return found


def test_a_file_that_grows_and_shrinks_is_refused_in_no_round_and_weighs_what_it_holds(
    deployed: Any, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = deployed(strategy_num_rounds=5)
    nodes = two_nodes(settings, files[1])
    path = rows_of(settings, "client 1")
    lines = path.read_text(encoding="utf-8").splitlines()
    nodes[2] = meanwhile(
        nodes[2], {2: lambda: write_lines(path, lines * 2), 4: lambda: write_lines(path, lines[:3])}
    )
    folded = weights(monkeypatch)
    result = run(settings, LocalGrid(nodes))
    assert result["refused"] == []
    before = len(lines)
    # The new number counts from the round after: until then a device weighs what it registered.
    assert [found["client 1"] for found in folded] == [before, before, 2 * before, 3, 3]
    assert all(line["replies"] == 2 for line in lines_of(settings) if line["round"])


def test_a_client_that_comes_with_new_rows_is_drawn_and_one_that_is_gone_is_not(
    deployed: Any, files: tuple[Path, Path]
) -> None:
    settings = deployed(strategy_clients_per_round=5)
    nodes = two_nodes(settings, files[1])
    path = rows_of(settings, "client 1")
    old = path.read_text(encoding="utf-8").splitlines()
    new = [json.dumps({**json.loads(line), "client": "newcomer"}) for line in old]
    nodes[2] = meanwhile(
        nodes[2], {1: lambda: write_lines(path, old + new), 3: lambda: write_lines(path, new)}
    )
    result = run(settings, LocalGrid(nodes))
    assert result["data"]["clients"] == 3
    clients = [line["clients"] for line in lines_of(settings) if line["round"]]
    assert clients == [2, 3, 3, 2]
    [refused] = result["refused"]  # in the round in which its rows were taken away
    assert (refused["who"], refused["reason"]) == (
        "client 1",
        "this client does not live on this node.",
    )


def test_a_file_that_is_gone_is_refused_once_and_mended_within_the_run(
    deployed: Any, files: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    settings = deployed(strategy_num_rounds=6)
    nodes = two_nodes(settings, files[1])
    path = rows_of(settings, "client 1")
    content = path.read_bytes()
    queries = 0
    honest = meanwhile(nodes[2], {2: path.unlink})

    def mended(payload: bytes) -> bytes:
        nonlocal queries
        if not read_request(payload).clients and (queries := queries + 1) == 4:
            path.write_bytes(content)
        return honest(payload)

    nodes[2] = mended
    with caplog.at_level(logging.INFO, "fedpet"):
        result = run(settings, LocalGrid(nodes))
    lines = [line for line in lines_of(settings) if line["round"]]
    assert [line["clients"] for line in lines] == [2, 2, 1, 1, 2, 2]
    of_client = [entry for entry in result["refused"] if entry["who"] == "client 1"]
    assert len(of_client) == 1
    assert "rows.jsonl" in of_client[0]["reason"]
    assert "this node cannot take part until this is mended: " in caplog.text
    assert lines[-1]["replies"] == 2


def test_another_checkpoint_is_found_at_the_roll_call_and_mended_within_the_run(
    deployed: Any, files: tuple[Path, Path], tmp_path: Path
) -> None:
    import shutil

    settings = deployed()
    other = make_backbone(tmp_path / "other", seed=1)
    nodes = two_nodes(settings, files[1], backbone=str(other))
    honest, queries = nodes[2], 0

    def mended(payload: bytes) -> bytes:
        nonlocal queries
        if not read_request(payload).clients and (queries := queries + 1) == 3:
            shutil.rmtree(other)
            shutil.copytree(files[0], other)
        return honest(payload)

    nodes[2] = mended
    result = run(settings, LocalGrid(nodes))
    assert {entry["who"] for entry in result["refused"]} == {"node 2"}
    assert "start server and nodes from the same checkpoint" in result["refused"][0]["reason"]
    assert [line for line in lines_of(settings) if line["round"]][-1]["replies"] == 2


def test_a_node_that_refuses_is_queried_less_and_less_often(monkeypatch: Any) -> None:
    pauses = [node_registry._pause(failures) for failures in range(12)]
    assert pauses[:4] == [0.0, 30.0, 60.0, 120.0]
    assert pauses[-1] == node_registry.LONGEST_PAUSE
    assert node_registry._pause(10**6) == node_registry.LONGEST_PAUSE


def test_a_node_of_other_packages_is_named_and_one_of_another_fedpet_takes_no_part(
    deployed: Any,
    files: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from fedpet.utils.source_digest import package_versions

    settings = deployed(clients_num_clients=1, strategy_node_wait_seconds=0.2)
    nodes = two_nodes(settings, files[1])
    theirs = iter(
        [
            {**package_versions(), "torch": "2.99.0"},
            {**package_versions(), "fedpet": "0.0.9 0123456789abcdef"},
        ]
    )
    said: dict[int, dict[str, str]] = {}

    def of_other_packages(node: int, honest: Handler) -> Handler:
        def answer(payload: bytes) -> bytes:
            if not read_request(payload).clients:
                if node not in said:
                    said[node] = next(theirs)
                with monkeypatch.context() as patch:
                    patch.setattr("fedpet.client.node.package_versions", lambda: said[node])
                    return honest(payload)
            return honest(payload)

        return answer

    grid = LocalGrid({node: of_other_packages(node, honest) for node, honest in nodes.items()})
    with caplog.at_level(logging.WARNING, "fedpet"):
        result = run(settings, grid)
    assert "node 1 runs torch 2.99.0 instead of" in caplog.text
    refused = {entry["who"]: entry["reason"] for entry in result["refused"]}
    assert refused.keys() == {"node 2"}
    assert "runs fedpet 0.0.9 0123456789abcdef instead of" in refused["node 2"]
    assert result["data"]["clients"] == 1


def test_a_node_s_name_stands_in_every_line_of_the_books(
    deployed: Any, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedpet.server.client_pool import ConnectedClientPool

    settings = deployed(strategy_num_rounds=2)
    nodes = two_nodes(settings, files[1])
    big = {2**63 + number: answer for number, answer in nodes.items()}
    path = rows_of(settings, "client 1")
    big[2**63 + 2] = meanwhile(big[2**63 + 2], {1: path.unlink})
    begin = ConnectedClientPool.__post_init__

    def named(pool: Any) -> None:
        begin(pool)
        pool.node_names.update({2**63 + 1: "ward-1", 2**63 + 2: "ward-2"})

    monkeypatch.setattr(ConnectedClientPool, "__post_init__", named)
    run(settings, LocalGrid(big))
    lines = lines_of(settings)
    assert str(2**63)[:12] not in json.dumps(lines)
    assert {node for line in lines for node in line["wire_by_node"]} == {"ward-1", "ward-2"}
    assert {entry.get("node", entry["who"]) for line in lines for entry in line["refused"]} == {
        "ward-2"
    }
