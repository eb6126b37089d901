"""Rounds that come to no average: a run that ends with one fails, one with many in a row stops."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from in_process_run import run
from search_runs import SEARCH
from tiny import Silent

from fedpet.client.node import Node
from fedpet.client.node_config import NodeConfig
from fedpet.config import Experiment
from fedpet.errors import RunError, Stalled
from fedpet.run.federate import federate, prepare
from fedpet.run.local_grid import LocalGrid
from fedpet.run.resume import check_journal, read_cut_short, searched_structure
from fedpet.run.run_folder import RunFolder
from fedpet.run.run_state import STALLED_ROUNDS


def broken_in(experiment: Experiment, *rounds: int) -> LocalGrid:
    """One node, whose every client is lost in these rounds, counted by its messages from 1."""
    node, asked = Node(NodeConfig.from_experiment(experiment)), [0]

    def answer(payload: bytes) -> bytes:
        asked[0] += 1
        if asked[0] in rounds:
            raise RuntimeError("out of order")
        return node.answer(payload)

    return LocalGrid({1: answer})


def go_on(path: Path) -> dict[str, Any]:
    prepared = prepare(read_cut_short(path), Silent(), structure=searched_structure(path))
    grid = LocalGrid.of(NodeConfig.from_experiment(prepared.experiment), 1)
    return federate(grid, prepared, RunFolder(path), Silent(), check_journal(path, prepared))


def rounds_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]


def test_a_run_whose_last_round_came_to_no_average_fails_with_the_model_of_the_one_before(
    experiment: Callable[..., Experiment],
) -> None:
    settled = experiment()
    with pytest.raises(RunError, match="is round 1 of 3") as failed:
        run(settled, broken_in(settled, 2, 3))
    assert not isinstance(failed.value, Stalled)
    out = Path(settled.run.out)
    result = json.loads((out / "result.json").read_text())
    assert result["run"]["status"] == "last round not averaged"
    assert result["quality"]["final"] == result["quality"]["by_round"][1]["value"]
    assert (out / "model" / "config.json").exists()


def test_a_run_that_recovers_before_its_end_succeeds(
    experiment: Callable[..., Experiment],
) -> None:
    settled = experiment(strategy_num_rounds=STALLED_ROUNDS + 1, strategy_evaluate_every=9)
    lost = range(2, STALLED_ROUNDS + 1)  # one less than would stop it
    assert run(settled, broken_in(settled, *lost))["run"]["status"] == "ok"


def test_a_run_that_stalls_stops_and_goes_on_to_the_bytes_of_an_undisturbed_one(
    experiment: Callable[..., Experiment],
) -> None:
    changes = {"strategy_num_rounds": STALLED_ROUNDS + 4, "strategy_evaluate_every": 99}
    undisturbed = run(experiment(**changes))
    settled = experiment(**changes)
    path = Path(settled.run.out)
    with pytest.raises(Stalled, match="rounds 3 to 7 met no quorum"):
        run(settled, broken_in(settled, *range(3, 20)))
    assert not (path / "result.json").exists()
    resumed = go_on(path)
    assert resumed["run"]["status"] == "ok"
    assert resumed["final_values_sha256"] == undisturbed["final_values_sha256"]
    assert [line["round"] for line in rounds_of(path)] == list(range(STALLED_ROUNDS + 5))


def test_a_run_that_learns_nothing_from_its_beginning_stops_and_can_be_begun_again(
    experiment: Callable[..., Experiment],
) -> None:
    settled = experiment(strategy_num_rounds=STALLED_ROUNDS + 1, strategy_evaluate_every=9)
    with pytest.raises(Stalled, match="rounds 1 to 5"):
        run(settled, broken_in(settled, *range(1, 20)))
    assert go_on(Path(settled.run.out))["run"]["status"] == "ok"


def test_a_search_that_stalls_stops_and_goes_on_to_the_same_structure(
    experiment: Callable[..., Experiment],
) -> None:
    changes = {**SEARCH, "search_rounds": STALLED_ROUNDS + 2, "search_settled_overlap": 1.0}
    changes |= {"strategy_clients_per_round": 2, "search_local_steps": 1}
    undisturbed = run(experiment(**changes))
    settled = experiment(**changes)
    with pytest.raises(Stalled, match="rounds 2 to 6"):
        run(settled, broken_in(settled, *range(2, 20)))
    resumed = go_on(Path(settled.run.out))
    assert resumed["final_values_sha256"] == undisturbed["final_values_sha256"]
