"""Hostile or mistaken nodes at the roll call: refused by name and reason, and the others go on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from in_process_run import Handler, run
from roll_call_runs import simulated, three_nodes
from tiny import Silent

from fedpet.client.node import Node
from fedpet.client.node_config import NodeConfig
from fedpet.errors import ConfigError, RunError
from fedpet.protocol.frame import Refusal, pack_refusal
from fedpet.protocol.registration import encode_registration
from fedpet.protocol.request import read_request
from fedpet.run.local_grid import LocalGrid
from fedpet.run.ray_engine import simulate
from fedpet.utils.source_digest import package_versions


def lying(honest: Handler, roster: Callable[[], bytes]) -> Handler:
    """A node that answers the roll call with something else."""

    def answer(payload: bytes) -> bytes:
        return honest(payload) if read_request(payload).clients else roster()

    return answer


def _raises() -> bytes:
    raise MemoryError("no room")


LIES: dict[str, Callable[[], bytes]] = {
    "registration does not read": lambda: b"\x80\x04nonsense" * 30,
    "control characters": lambda: encode_registration({"xy": 1}, package_versions()).replace(
        b"y", b"\n"
    ),
    "no room": _raises,
    "I will not": lambda: pack_refusal(Refusal(bytes(16), 0, 0, "I will not.")),
}


@pytest.mark.parametrize("words", LIES)
def test_a_node_that_gives_no_roster_takes_no_part_and_the_others_go_on(
    deployed: Any, files: tuple[Path, Path], words: str
) -> None:
    settings = deployed(clients_num_clients=4)
    nodes = three_nodes(settings, files[1])
    nodes[9] = lying(nodes[9], LIES[words])
    result = run(settings, LocalGrid(nodes))
    assert result["data"]["clients"] == 4
    assert {refused["who"] for refused in result["refused"]} == {"node 9"}
    assert any(
        word in refused["reason"] for word in words.split("|") for refused in result["refused"]
    )
    # One that errs may have had a bad moment; one that refuses would say the same again.
    assert len(result["refused"]) == (3 if words == "no room" else 1)


def test_a_node_cannot_take_another_s_clients(
    deployed: Any, files: tuple[Path, Path], experiment: Any
) -> None:
    settings = deployed()
    nodes = three_nodes(settings, files[1])
    theirs = {"client 1": 10**6, "client 2": 10**6}
    nodes[8] = lying(nodes[9], lambda: encode_registration(theirs, package_versions()))
    result = run(settings, LocalGrid(nodes))
    reasons = [refused["reason"] for refused in result["refused"]]
    assert len(reasons) == 2
    assert all("which lives on node 5" in reason for reason in reasons)
    assert result["final_values_sha256"] == simulated(experiment())["final_values_sha256"]


def test_a_run_whose_nodes_all_refuse_ends_with_the_reason(
    deployed: Any, files: tuple[Path, Path]
) -> None:
    settings = deployed(strategy_node_wait_seconds=0.2)
    missing = NodeConfig.from_experiment(settings, {"data": "nowhere.jsonl"})
    with pytest.raises(RunError, match=r"none of 1 nodes .* no file or folder 'nowhere.jsonl'"):
        run(settings, LocalGrid({3: Node(missing).answer}))


def test_a_label_that_the_plan_does_not_know_is_found_at_the_roll_call(
    deployed: Any, files: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = deployed(clients_num_clients=4)
    nodes = three_nodes(settings, files[1])
    strange = tmp_path / "strange.jsonl"
    strange.write_text('{"text": "a film", "label": 7, "client": "x"}\n' * 4, encoding="utf-8")
    nodes[9] = Node(NodeConfig.from_experiment(settings, {"data": str(strange)})).answer
    [refused] = run(settings, LocalGrid(nodes))["refused"]
    assert refused["who"] == "node 9"
    assert "the node's log says why" in refused["reason"]
    assert "has the label 7" in caplog.text


def test_a_node_without_rows_of_its_own_says_how_to_give_it_some(
    deployed: Any, files: tuple[Path, Path]
) -> None:
    settings = deployed(strategy_node_wait_seconds=0.2)
    with pytest.raises(RunError, match="--node-config"):
        run(settings, LocalGrid({3: Node(NodeConfig.from_experiment(settings)).answer}))


def test_a_simulation_cannot_have_its_clients_on_nodes(deployed: Any) -> None:
    with pytest.raises(ConfigError, match="fedpet deploy"):
        simulate(deployed(), Silent())


def test_a_node_s_words_are_one_printable_line_of_bounded_length(
    deployed: Any, files: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    settings = deployed(clients_num_clients=4, strategy_num_rounds=1)

    def loud() -> bytes:
        raise MemoryError("\x1b[2J\nround 1: all is well" + "x" * 10**6)

    nodes = three_nodes(settings, files[1])
    nodes[9] = lying(nodes[9], loud)
    result = run(settings, LocalGrid(nodes))
    told = [refused["reason"] for refused in result["refused"]] + caplog.messages
    assert any("all is well" in line for line in told)
    assert all("\x1b" not in line and "\n" not in line and len(line) < 1000 for line in told)
