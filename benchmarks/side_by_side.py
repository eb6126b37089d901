"""Run the job of `make run` by two checkouts in turn, and compare what it took.

    python -m benchmarks.side_by_side --before CHECKOUT [--times 3] [--set KEY=VALUE ...]
        [--out FILE]

Each run is a process of its own, on the same machine one behind the other, and reports its own
times: the whole, the rounds' local training, the evaluations, and the rounds outside training.
Clients, rows and steps of both are the same (same seeds), so that local training compares steps.
Reported are each run's seconds, and the medians of now over before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedpet.run.run_folder import machine, versions

HERE = Path(__file__).parents[1]
BEFORE, NOW = "before", "now"
SECONDS = ("total_seconds", "rounds_seconds", "local_training_seconds", "evaluation_seconds")
OUTSIDE = "outside_training_fraction"


def in_turn(before: Path | None, times: int) -> Iterator[tuple[str, Path]]:
    """Yield the checkouts in the order of their runs, each with its name."""
    for _ in range(times):
        if before is not None:
            yield BEFORE, before.resolve()
        yield NOW, HERE


def python_of(checkout: Path, *first: str) -> tuple[list[str], dict[str, str]]:
    """Return the command of a Python that imports a checkout's fedpet, and its environment.

    Args:
        checkout: Folder that holds the package.
        first: Folders to import from before it.
    """
    paths = os.pathsep.join([*first, str(checkout)])
    return [sys.executable], {**os.environ, "PYTHONPATH": paths}


def run_job(checkout: Path, settings: Sequence[str]) -> dict[str, Any]:
    """Run the job by a checkout; return its times, metric and digest of the values.

    Raises:
        RuntimeError: It failed.
    """
    job = checkout / "simulations" / "experiments" / "film-reviews.toml"
    with tempfile.TemporaryDirectory() as folder:
        command, environment = python_of(checkout)
        command += ["-c", "from fedpet.cli.main import main; main()", "simulate", str(job)]
        command += ["--out", f"{folder}/run", *(part for s in settings for part in ("--set", s))]
        done = subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"the job of {checkout} failed: {done.stderr[-2000:]}")
        result = json.loads((Path(folder) / "run" / "result.json").read_text(encoding="utf-8"))
    time = {name: result["time"][name] for name in (*SECONDS, OUTSIDE)}
    return {
        **time,
        "metric": result["quality"]["final"],
        "final_values_sha256": result["final_values_sha256"],
    }


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the median of now over the median of before, for each of `SECONDS`."""

    def median(code: str, name: str) -> float:
        return float(statistics.median(row[name] for row in rows if row["code"] == code))

    return {name: median(NOW, name) / median(BEFORE, name) for name in SECONDS}


def main() -> None:
    """Run, print, and write the file of --out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="the other checkout")
    parser.add_argument("--times", type=int, default=3, help="runs of each")
    parser.add_argument("--set", nargs="*", default=[], help="KEY=VALUE of the experiment")
    parser.add_argument("--out", type=Path, help="write the measurement to this JSON file")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for code, checkout in in_turn(arguments.before, arguments.times):
        rows.append({"code": code, **run_job(checkout, arguments.set)})
        print(_line(rows[-1]), file=sys.stderr, flush=True)
    found = {
        "rows": rows,
        "now_of_before": ratios(rows),
        "versions": versions(),
        "machine": machine(),
    }
    text = json.dumps(found, indent=2) + "\n"
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text, encoding="utf-8")
    print(text)


def _line(row: dict[str, Any]) -> str:
    seconds = ", ".join(f"{name.removesuffix('_seconds')} {row[name]:.1f} s" for name in SECONDS)
    return f"{row['code']}: {seconds}, outside training {100 * row[OUTSIDE]:.2f} %"


if __name__ == "__main__":
    main()
