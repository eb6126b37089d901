"""Runs a tiny federation in processes that are killed, and goes on with it. A program of its own.

    python tests/helpers/crash_harness.py FOLDER STRATEGY {steps,moments} KILLS SEED

"steps" kills the process itself, with SIGKILL, before or after one of its calls that bring bytes
to the disk; "moments" kills it from outside, after a random time. Prints what came out, as JSON.
Processes are forked from this one, in which torch has no threads, so that each starts at once.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import tiny
from tiny import Silent

from fedpet.client.node_config import NodeConfig
from fedpet.run.checkpoint_file import read_journal
from fedpet.run.client_journal import read_records
from fedpet.run.federate import Prepared, federate, prepare
from fedpet.run.local_grid import LocalGrid
from fedpet.run.resume import check_journal
from fedpet.run.run_folder import RunFolder

STEPS = ("fsync", "replace", "truncate")  # of the module os


def attempt(prepared: Prepared, out: Path, *, step: int = 0, seconds: float = 0.0) -> bool:
    """Run or go on with a run in a process of its own; says whether it came to its end.

    Args:
        prepared: Of the run.
        out: Its folder.
        step: Half calls to the disk after which the process kills itself; 0 lets it be.
        seconds: After which it is killed; 0 lets it be.
    """
    child = os.fork()
    if not child:
        code = 1
        try:
            if step:
                kill_at(step)
            journal = check_journal(out, prepared) if (out / "config.toml").exists() else None
            grid = LocalGrid.of(NodeConfig.from_experiment(prepared.experiment), 2)
            federate(grid, prepared, RunFolder(out), Silent(), journal)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if seconds:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        journal = read_journal(out)  # never unreadable
        if journal is not None:
            read_records(out, journal.clients_file)
        return False
    if os.WEXITSTATUS(status):
        raise SystemExit(f"the run in {out} failed.")
    return True


def kill_at(step: int) -> None:
    """Kill this process before (odd steps) or after (even ones) one of its calls to the disk."""
    half = [0]

    def tick() -> None:
        half[0] += 1
        if half[0] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(call: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            tick()
            result = call(*args, **kwargs)
            tick()
            return result

        return run

    for name in STEPS:
        setattr(os, name, watched(getattr(os, name)))


def summary(out: Path) -> dict[str, Any]:
    """Return what must be the same however often the run was killed."""
    result = json.loads((out / "result.json").read_text())
    lines = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    return {
        "sha256": result["final_values_sha256"],
        "quality": result["quality"],
        "communication": result["communication"],
        "rounds": [line["round"] for line in lines],
        "losses": [line["loss"] for line in lines],
        "left": sorted(path.name for path in out.iterdir()),
    }


def main(folder: Path, strategy: str, how: str, kills: int, seed: int) -> None:
    changes: dict[str, Any] = {"strategy_name": strategy, "strategy_evaluate_every": 2}
    if strategy == "fedavgm":
        changes |= {"strategy_server_momentum": 0.5}
    files = tiny.make_backbone(folder / "backbone"), tiny.make_rows(folder / "rows")
    prepared = prepare(tiny.make_experiment(*files, folder / "whole", **changes), Silent())
    (folder / "whole").mkdir()
    started = time.monotonic()
    attempt(prepared, folder / "whole")
    whole_seconds = time.monotonic() - started
    expected = summary(folder / "whole")

    generator = random.Random(seed)
    killed, resumed, number = 0, [], 0
    while killed < kills:
        number += 1
        out = folder / f"killed{number}"
        out.mkdir()
        done = False
        while not done:
            if killed >= kills:
                done = attempt(prepared, out)
            elif how == "steps":
                done = attempt(prepared, out, step=generator.randint(1, 24))
            else:
                done = attempt(prepared, out, seconds=generator.uniform(0.01, whole_seconds))
            killed += not done
        resumed.append(summary(out))
    same = all(one == expected for one in resumed)
    print(json.dumps({"expected": expected, "resumed": resumed, "killed": killed, "same": same}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
