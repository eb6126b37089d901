"""Nodes with a worker that stays, and nodes of Flower's own way: real processes over TLS."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
from deployed import Place

pytestmark = [pytest.mark.simulation, pytest.mark.timeout(600)]

RUN_SECONDS = 400.0


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    rows = tiny.make_rows(folder / "rows", clients=2, rows_per_client=8)
    return tiny.make_backbone(folder / "backbone"), rows


def ready(log: str) -> list[int]:
    """Return the process ids of the workers that a log tells of, in their order."""
    return [int(number) for number in re.findall(r"worker (\d+) is ready", log)]


def wait_for(found: Any) -> Any:
    limit = time.monotonic() + RUN_SECONDS
    while time.monotonic() < limit:
        if what := found():
            return what
        time.sleep(0.1)
    raise AssertionError("it did not come")


def test_a_worker_answers_every_message_and_one_that_is_killed_comes_back(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    place = Place(files, tmp_path, ["stays", "killed"])
    changes = {"strategy_num_rounds": 4, "strategy_quorum": 0.5}
    with place.deploy(2, **changes) as real:
        real.start_server()
        real.register()
        for name in place.names:
            real.start_node(name)

        def meanwhile() -> None:
            wait_for(lambda: len(real.rounds("tiny-1")) > 1)
            os.kill(ready(real.log("killed"))[0], signal.SIGKILL)

        done = real.run(limit_seconds=RUN_SECONDS, meanwhile=meanwhile)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        logs = {name: real.log(name) for name in place.names}
        rounds = real.rounds("tiny-1")
        # One more run, by the same processes: they outlive a run.
        done = real.run("strategy-num-rounds=1", limit_seconds=RUN_SECONDS)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        assert ready(real.log("stays")) == ready(logs["stays"])
        result = real.result("tiny-2")
    assert len(ready(logs["stays"])) == 1
    assert logs["stays"].count("answered a train message") == 4
    assert logs["stays"].count("answered a query message") == 1
    first, second = ready(logs["killed"])
    assert first != second
    assert "the worker ended with status -9" in logs["killed"]
    assert rounds[-1]["replies"] == 2
    expected = place.expected(place.names, strategy_num_rounds=1)
    assert result["final_values_sha256"] == expected


def test_flower_s_own_way_gives_the_same_bits(files: tuple[Path, Path], tmp_path: Path) -> None:
    place = Place(files, tmp_path, ["one"])
    changes = {"strategy_num_rounds": 1}
    with place.deploy(1, isolation="subprocess", **changes) as real:
        script = (real.folder / "nodes" / "one" / "supernode.sh").read_text()
        assert "exec flower-supernode" in script
        real.start_server()
        real.register()
        real.start_node("one")
        done = real.run(limit_seconds=RUN_SECONDS)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        assert not ready(real.log("one"))
        assert real.result("tiny-1")["final_values_sha256"] == place.expected(["one"], **changes)
