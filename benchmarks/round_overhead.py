"""Measure a round's cost apart from training, by clients of a round: time, and memory.

    python -m benchmarks.round_overhead [--clients 100 1000 10000] [--rounds 5] [--out FILE]
        [--before CHECKOUT] [--times 1]

Everything but the training is as in the default job, with LoRA factors, 89,870 values in all: each
client's values are written into the resident model, read out, encoded, framed, sent through Ray,
checked, decoded and averaged, and each client's bytes are counted alone: once without loss, once by
the codec of the default job. In the place of training, every value moves by seeded noise of
deviation 0.001, so that frames are as long as real ones; each client has one made-up row.

For each codec and number of clients there is a run in a process of its own
(`benchmarks/noisy_rounds.py`). Processor time is that between the ends of the first round, in which
the workers load the model, and of the last but one: of the workers, of the process with server and
Flower, and of Ray's own. Its median over rounds leaves out the one in which a process loads the
codec's kernels, which it does once. The peak of memory is that of all of them together, each page
shared by n processes counted for a part of n (Linux's PSS).

With `--before` runs of another checkout of fedpet take turns with those of this one, each by the
codec of its own default job; commit 69e4983 is the oldest that can be.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # it has no stubs

from benchmarks import noisy_rounds
from benchmarks.noisy_rounds import CODECS
from benchmarks.side_by_side import in_turn, python_of
from fedpet.run.run_folder import machine, versions

SAMPLE_SECONDS = 0.2  # between two looks at the memory


def measure(checkout: Path, clients: int, rounds: int, codec: str) -> dict[str, Any]:
    """Run the rounds by a checkout's fedpet; return their seconds, bytes and peak of memory.

    Raises:
        RuntimeError: The run failed, or was another fedpet's.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        script = shutil.copy(noisy_rounds.__file__, folder)
        command, environment = python_of(checkout, folder)
        command += [str(script), str(clients), str(rounds), codec, str(file)]
        with subprocess.Popen(command, env=environment, cwd=folder) as process:
            peak = peak_bytes(process.pid, lambda: process.poll() is not None)
        if process.returncode:
            raise RuntimeError(f"the rounds of {checkout} ended with {process.returncode}.")
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if Path(found.pop("checkout")) != checkout:
        raise RuntimeError(f"{checkout} holds no package fedpet.")
    return {**found, "peak_mb": peak / 1e6}


def measure_apart(work: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """Call in a process of its own, and add the peak of its and its children's memory."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        [worker] = multiprocessing.active_children()
        found = pool.apply_async(work, given)
        peak = peak_bytes(worker.pid, found.ready)
        return {**found.get(), "peak_mb": peak / 1e6}


def peak_bytes(number: int | None, is_over: Callable[[], bool]) -> int:
    """Return the most memory that a process and those below it take until something is over."""
    peak, pause = 0, threading.Event()
    while not is_over():
        with suppress(psutil.Error):
            peak = max(peak, memory_bytes(psutil.Process(number)))
        pause.wait(SAMPLE_SECONDS)
    return peak


def memory_bytes(process: psutil.Process) -> int:
    """Return the memory that a process and those below it take now."""
    taken = 0
    with suppress(psutil.Error):
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):
                taken += one.memory_full_info().pss
    return taken


def main() -> None:
    """Measure, print, and write the file of --out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--rounds", type=int, default=5, help="at least 3")
    parser.add_argument("--codecs", nargs="+", default=list(CODECS), choices=list(CODECS))
    parser.add_argument("--before", type=Path, help="another checkout, to take turns with")
    parser.add_argument("--times", type=int, default=1, help="each run so often")
    parser.add_argument("--out", type=Path, help="write the measurement to this JSON file")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in arguments.codecs:
        for clients in arguments.clients:
            for code, checkout in in_turn(arguments.before, arguments.times):
                row: dict[str, Any] = {"name": name, "code": code}
                row |= measure(checkout, clients, arguments.rounds, name)
                print(_line(row), file=sys.stderr, flush=True)
                rows.append(row)
    found = {"rows": rows, "versions": versions(), "machine": machine()}
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    else:
        print(json.dumps(found, indent=2))


def _line(row: dict[str, Any]) -> str:
    spent = ", ".join(f"{p} {ms:.2f}" for p, ms in row["median_processor_ms_per_client"].items())
    return (
        f"{row['code']}, {row['name']}, {row['clients']} clients: "
        f"{row['median_later_round_seconds']:.2f} s a round, ms of processor time a client: "
        f"{spent}; {row['messages_per_round']} messages, peak {row['peak_mb']:.0f} MB"
    )


if __name__ == "__main__":
    main()
