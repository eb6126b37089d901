"""Clients that come with their nodes: the same run as a simulation of the same clients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from in_process_run import run
from roll_call_runs import lines_of, node_of, simulated, three_nodes
from tiny import Silent

from fedpet.estimate import estimate
from fedpet.run.federate import federate, prepare
from fedpet.run.local_grid import LocalGrid
from fedpet.run.resume import check_journal, is_cut_short, read_cut_short
from fedpet.run.run_folder import RunFolder


@pytest.mark.parametrize("codec", ["float32", "eden-4"])
def test_nodes_with_their_own_files_end_with_the_simulation_s_values(
    experiment: Any, deployed: Any, files: tuple[Path, Path], codec: str
) -> None:
    settings = deployed(codec_uplink=codec)
    result = run(settings, LocalGrid(three_nodes(settings, files[1])))
    expected = simulated(experiment(codec_uplink=codec))
    assert result["final_values_sha256"] == expected["final_values_sha256"]
    assert result["run"]["plan_digest"] == expected["run"]["plan_digest"]
    no_spread = {"by_client": {}}  # a node's held-out rows name no client
    assert result["quality"] == expected["quality"] | no_spread
    on_nodes = ("classes", "rows")  # of the training rows the server knows their number alone
    for key in result["data"].keys() - on_nodes:
        assert result["data"][key] == expected["data"][key]
    assert [one["train_rows"] for one in result["data"]["classes"]] == [None, None]


def test_one_client_a_node_under_the_name_its_config_gives_ends_the_same(
    experiment: Any, deployed: Any, files: tuple[Path, Path]
) -> None:
    settings = deployed()
    nodes = {
        50 - number: node_of(settings, files[1], [name], client=name)
        for number, name in enumerate(f"client {n}" for n in range(6))
    }
    result = run(settings, LocalGrid(nodes))
    expected = simulated(experiment())["final_values_sha256"]
    assert result["final_values_sha256"] == expected


def test_the_roll_call_is_counted_as_the_plan_s_and_goes_to_each_node_once(
    deployed: Any, experiment: Any, files: tuple[Path, Path]
) -> None:
    settings = deployed(strategy_clients_per_round=6)
    nodes = {n: node_of(settings, files[1], [f"client {n}"]) for n in range(1, 6)}
    nodes[6] = node_of(settings, files[1], ["client 0"])
    result = run(settings, LocalGrid(nodes))["communication"]
    lines = lines_of(settings)
    assert [line["newcomers"] for line in lines] == [0, 6, 0, 0]
    assert [line["messages"] for line in lines] == [0, 24, 12, 12]
    assert [line["plan_bytes"] > 0 for line in lines] == [False, True, False, False]
    # With one client a node what devices send alone is what went over the wire.
    assert result["total_bytes"] == pytest.approx(result["wire_bytes"], rel=0.02)
    # The plan goes with the question, so training messages weigh what they do in a simulation.
    plain = simulated(experiment(strategy_clients_per_round=6))["communication"]
    assert result["uplink_bytes"] == plain["uplink_bytes"]
    assert result["downlink_bytes"] == plain["downlink_bytes"]
    told = estimate(settings, num_clients=6).communication["plan_bytes"]
    assert told == pytest.approx(result["plan_bytes"], rel=0.01)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"codec_uplink": "topk-0.3+eden-4", "codec_error_feedback": True, "codec_downlink": "int8"},
    ],
    ids=["plain", "with memory"],
)
def test_a_deployed_run_that_was_cut_short_goes_on_with_nodes_that_come_anew(
    deployed: Any, files: tuple[Path, Path], changes: dict[str, Any]
) -> None:
    class StopsInRound2(LocalGrid):
        rounds = 0

        def pull_messages(self, message_ids: Any) -> Any:
            replies = list(super().pull_messages(message_ids))
            self.rounds += any(reply.metadata.message_type == "train" for reply in replies)
            if self.rounds == 2:
                raise KeyboardInterrupt
            return replies

    whole = deployed(**changes)
    expected = run(whole, LocalGrid(three_nodes(whole, files[1])))
    settings = deployed(**changes)
    nodes = three_nodes(settings, files[1])
    with pytest.raises(KeyboardInterrupt):
        run(settings, StopsInRound2(nodes))
    folder = Path(settings.run.out)
    assert is_cut_short(folder)
    prepared = prepare(read_cut_short(folder), Silent())
    journal = check_journal(folder, prepared)
    result = federate(LocalGrid(nodes), prepared, RunFolder(folder), Silent(), journal)
    assert not is_cut_short(folder)
    assert result["final_values_sha256"] == expected["final_values_sha256"]
    assert result["communication"]["plan_bytes"] == expected["communication"]["plan_bytes"]
    on_nodes = ("classes", "rows")  # of the training rows the server knows their number alone
    for key in result["data"].keys() - on_nodes:
        assert result["data"][key] == expected["data"][key]
    assert [one["train_rows"] for one in result["data"]["classes"]] == [None, None]
