"""The books of a whole run: what was on the wire, by node, kind and direction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from in_process_run import run

from fedpet.errors import RunError
from fedpet.protocol.ledger import Ledger
from fedpet.run.run_folder import RunFolder


def test_the_bytes_of_a_run_with_one_client_a_node_are_those_on_the_wire(experiment: Any) -> None:
    settings = experiment(strategy_num_rounds=1, strategy_clients_per_round=6)
    result = run(settings, nodes=6)["communication"]
    # The ids in a message's metadata are shorter here than between machines.
    assert result["total_bytes"] == pytest.approx(result["wire_bytes"], rel=0.02)
    assert result["messages"] == 12


def test_what_is_counted_does_not_depend_on_the_spread_over_nodes(experiment: Any) -> None:
    def books(nodes: int) -> dict[str, Any]:
        books: dict[str, Any] = run(experiment(), nodes=nodes)["communication"]
        return {k: v for k, v in books.items() if not k.startswith(("wire_", "messages"))}

    first, second = books(1), books(4)
    # Only the seconds in a frame differ from run to run, and they have a fixed width.
    assert first == second


def test_the_books_have_every_message_by_node_kind_and_direction(experiment: Any) -> None:
    settings = experiment(strategy_num_rounds=2)
    result = run(settings, nodes=3)
    lines = [
        json.loads(line)
        for line in (Path(settings.run.out) / "rounds.jsonl").read_text().splitlines()
    ]
    for line in lines:
        counted = line["wire_by_node"]
        assert sum(sum(each.values()) for each in counted.values()) == line["wire_bytes"]
        assert all(set(each) >= {"train down", "train up"} for each in counted.values())
    books = result["communication"]
    assert sum(line["wire_bytes"] for line in lines) == books["wire_bytes"]
    assert sum(books["wire_by_kind"].values()) == books["wire_bytes"]
    assert set(books["wire_by_kind"]) == {"plan down", "train down", "train up"}
    # The plan goes to each node once, and is counted as long as it is.
    plan = (Path(settings.run.out) / "plan.bin").stat().st_size
    assert books["wire_by_kind"]["plan down"] == 3 * plan
    assert {node for line in lines for node in line["wire_by_node"]} == {"1", "2", "3"}


def test_books_that_the_disk_does_not_take_end_the_run_with_one_sentence(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)  # a folder, where a file should be
    ledger.begin(0)
    with pytest.raises(RunError, match=r"cannot be written: .* Make room"):
        ledger.close()
    with pytest.raises(RunError, match=r"result\.json' cannot be written: .* Make room"):
        RunFolder(tmp_path / "gone").write_result({})
