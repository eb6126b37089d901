"""Nodes that die, come late, lie, dawdle: real processes over TLS, and what the run makes of it."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from deployed import Place

from fedpet.deploy.membership import read_deployment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FAULTY = Path(__file__).parents[1] / "helpers" / "faulty_node"
RUN_SECONDS = 400.0


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    rows = tiny.make_rows(folder / "rows", clients=9, rows_per_client=8)
    return tiny.make_backbone(folder / "backbone"), rows


def faulty(fault: str, **more: str) -> dict[str, str]:
    return {"PYTHONPATH": str(FAULTY), "FAULT": fault, **more}


def test_what_is_wrong_is_refused_by_name_and_the_rest_averaged(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    wrong = {
        "nan": "",
        "length": "values by",
        "stale": "is of round 0, this is 1",
        "duplicate": "a second frame",
        "raises": "it failed with RuntimeError: see the node's log",
        "checkpoint": "start server and nodes from the same checkpoint",
    }
    names = ["good-1", "good-2", *wrong]
    place = Place(files, tmp_path, names)
    other = tiny.make_backbone(tmp_path / "other", seed=1)
    changes = {"strategy_num_rounds": 1, "strategy_quorum": 0.3}
    with place.deploy(len(names), **changes) as real:
        with (real.folder / "nodes" / "checkpoint" / "node.toml").open("a") as config:
            config.write(f"backbone = {json.dumps(str(other))}\n")
        real.start_server()
        real.register()
        for name in names:
            real.start_node(name, **(faulty(name) if name in wrong else {}))
        done = real.run(limit_seconds=RUN_SECONDS)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        result, said = real.result("tiny-1"), real.log("checkpoint")
    refused = {entry["who"]: entry["reason"] for entry in result["refused"]}
    assert sorted(refused) == sorted(wrong)
    for name, words in wrong.items():
        assert words in refused[name], refused[name]
    # Another checkpoint is found when the node registers: its client is never drawn.
    assert result["data"]["clients"] == len(names) - 1
    told = [(event["node"], event["event"]) for event in result["events"]]
    assert told == [("checkpoint", "suspended"), ("raises", "suspended")]
    assert "this node cannot take part until this is mended" in said
    # Of a duplicate the first frame is kept.
    assert result["final_values_sha256"] == place.expected(
        ["good-1", "good-2", "duplicate"], **changes
    )


def test_a_node_slower_than_the_deadline_is_left_out_of_the_round(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    place = Place(files, tmp_path, ["good-1", "good-2", "slow"])
    deadline = 60.0
    changes = {"strategy_num_rounds": 1, "strategy_round_deadline_seconds": deadline}
    with place.deploy(3, **changes) as real:
        real.start_server()
        real.register()
        for name in place.names:
            fault = faulty("hangs", HANGS_AT=str(tmp_path / "hangs")) if name == "slow" else {}
            real.start_node(name, **fault)
        done = real.run(limit_seconds=RUN_SECONDS)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        result = real.result("tiny-1")
    [refused] = result["refused"]
    assert (refused["who"], "deadline" in refused["reason"]) == ("slow", True)
    assert result["time"]["rounds_seconds"] > deadline
    assert result["final_values_sha256"] == place.expected(["good-1", "good-2"], **changes)


def test_a_node_killed_mid_round_is_named_and_a_latecomer_takes_part(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    place = Place(files, tmp_path, ["good", "victim", "late"])
    hangs = tmp_path / "hangs"
    with place.deploy(2, strategy_num_rounds=4) as real:
        real.start_server()
        real.register()
        real.start_node("good")
        real.start_node("victim", **faulty("hangs", HANGS_AT=str(hangs)))

        def meanwhile() -> None:
            limit = time.monotonic() + RUN_SECONDS
            while not hangs.exists() and time.monotonic() < limit:
                time.sleep(0.2)
            real.kill("victim")
            real.start_node("late")

        done = real.run(limit_seconds=RUN_SECONDS, meanwhile=meanwhile)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        result, rounds = real.result("tiny-1"), real.rounds("tiny-1")
    assert hangs.exists()
    assert {refused["who"] for refused in result["refused"]} == {"victim"}
    assert "Node" in result["refused"][0]["reason"]
    # It is drawn from for as long as Flower takes it to be there; the latecomer from its answer on,
    # one round sooner or later, as fast as its process starts.
    replies = [line["replies"] for line in rounds[1:]]
    assert (replies[0], replies[-1]) == (1, 2)
    assert replies == sorted(replies)
    assert result["run"]["status"] == "ok"
    assert result["data"]["clients"] == 3


def test_a_supernode_that_crashes_is_started_again_and_comes_back_within_the_run(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    """Its unit starts it again; the values are those of the same participants by round."""
    from benchmarks.eventful_run import told
    from benchmarks.replay import replay, take_part

    place = Place(files, tmp_path, ["stays", "crashes"])
    num_rounds = 16
    with place.deploy(2, strategy_num_rounds=num_rounds, strategy_quorum=0.3) as real:
        real.start_server()
        real.register()
        for name in place.names:
            real.start_node(name)

        def is_back() -> bool:
            lines = real.rounds("tiny-1")
            return ("crashes", "registered") in told(lines) or len(lines) > num_rounds

        def meanwhile() -> None:
            while len(real.rounds("tiny-1")) < 2:
                time.sleep(0.1)
            real.kill("crashes")
            real.keep_node("crashes", is_back)

        done = real.run(limit_seconds=RUN_SECONDS, meanwhile=meanwhile)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        result, lines = real.result("tiny-1"), real.rounds("tiny-1")
        assert told(lines) == [("crashes", "disconnected"), ("crashes", "registered")]
        assert {refused["who"] for refused in result["refused"]} == {"crashes"}
        assert take_part(lines[-1])[1] == set(place.names)
        again = tmp_path / "again"
        again.mkdir()
        nodes = {name: real.folder / "nodes" / name for name in place.names}
        for name, folder in nodes.items():
            shutil.copy(folder / "data.jsonl", again / f"{name}.jsonl")
        served = read_deployment(real.folder).experiment
        expected = replay(served, nodes, lines, again, lambda name: None)
    assert result["final_values_sha256"] == expected


def test_a_run_in_which_all_nodes_fail_exits_with_1_and_says_why(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    place = Place(files, tmp_path, ["one", "two"])
    with place.deploy(2, strategy_num_rounds=2) as real:
        real.start_server()
        real.register()
        for name in place.names:
            real.start_node(name, **faulty("raises"))
        done = real.run(limit_seconds=RUN_SECONDS)
        rounds = real.rounds("tiny-1")
        assert real.result("tiny-1")["run"]["status"] == "nothing learned"
    assert done.returncode == 1
    assert "finished:failed" in done.stderr
    assert "nothing was learned" in done.stdout + done.stderr
    refused = [{one["who"] for one in line["refused"]} for line in rounds]
    assert refused[:2] == [set(), {"one", "two"}]
    # Neither is drawn again before it has registered anew; no round waits for the second to.
    assert refused[2]
    assert refused[2] <= {"one", "two"}
    assert not any(line["aggregated"] for line in rounds)
    assert "RuntimeError: see the node's log" in rounds[1]["refused"][0]["reason"]


def test_a_server_killed_again_and_again_goes_on_to_the_same_values(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    place = Place(files, tmp_path, ["one", "two"])
    changes = {"strategy_num_rounds": 4}
    with place.deploy(2, **changes) as real:

        def killed_after(lines: int) -> Callable[[], None]:
            def meanwhile() -> None:
                limit = time.monotonic() + RUN_SECONDS
                while len(real.rounds("tiny-1")) < lines and time.monotonic() < limit:
                    time.sleep(0.1)
                real.kill("server")

            return meanwhile

        real.start_server()
        real.register()
        for name in place.names:
            real.start_node(name)
        done = real.run(limit_seconds=RUN_SECONDS, meanwhile=killed_after(1))
        assert done.returncode == 1
        for lines in (2, 4):
            real.start_server()
            same = "run-out='runs/tiny-1'"
            done = real.run(same, limit_seconds=RUN_SECONDS, meanwhile=killed_after(lines))
            assert done.returncode == 1
        real.start_server()
        done = real.run(same, limit_seconds=RUN_SECONDS)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        result, rounds = real.result("tiny-1"), real.rounds("tiny-1")
    assert [line["round"] for line in rounds] == [0, 1, 2, 3, 4]
    assert result["final_values_sha256"] == place.expected(place.names, **changes)


def test_no_process_outlives_its_block(files: tuple[Path, Path], tmp_path: Path) -> None:
    from benchmarks.real_nodes import descendants

    before = set(descendants(os.getpid()))
    with Place(files, tmp_path, ["one"]).deploy(1) as real:
        real.start_server()
        assert set(descendants(os.getpid())) > before
    assert set(descendants(os.getpid())) == before
