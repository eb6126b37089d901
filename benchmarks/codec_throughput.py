"""Measure each codec on one core: bits, error, and processor time to encode, decode and add.

    python -m benchmarks.codec_throughput [--times N] [--out FILE.json]

The vector is one client's update by the recommended job, 89,870 values in four groups, drawn from a
normal distribution; behind it stand the squared errors on Gaussian, Laplace and Student-t3 vectors,
relative to the squared norm. To add is what a server does with an update: read it, check it, add it
to the round's sum (`VectorSum.add`). Times are the processor's, medians of alternating runs of all
codecs, by numpy and by the compiled kernels, where numba is installed. Beside them stands
`zstandard` at level 3 on the same float32 bytes, in the same run, to compare machines by. Exits
with 1 where a codec takes longer than its bar.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from fedpet.codec import Seeds, VectorCodec, decode_values, encode_values
from fedpet.codec.acceleration import Choice, use_kernels
from fedpet.codec.spec import CODEC_IDS
from fedpet.run.run_folder import machine, versions

SIZES = (10_764, 73_728, 4_608, 770)  # of the groups, of which a longer vector has multiples
EXTRA = ("topk-0.1+int8", "topk-0.1+dither-4")
CODECS = (*CODEC_IDS, *(f"{base}-raw" for base in CODEC_IDS), *EXTRA)
ZSTANDARD = "zstandard level 3"
JOBS = ("encode", "decode", "add")
DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "gaussian": lambda rng, count: rng.standard_normal(count),
    "laplace": lambda rng, count: rng.laplace(size=count),
    "student-t3": lambda rng, count: rng.standard_t(3, size=count),
}


def most_nanoseconds(codec: str, job: str, kernels: str) -> float:
    """Return the bar of a job, in nanoseconds a value."""
    if codec.startswith("dither") and kernels == "compiled":
        return {"encode": 6.7, "decode": 6.7, "add": 4.5}[job]
    if "eden" in codec or "dither" in codec:
        return 200
    return 20 if codec.startswith(("float32", "bfloat16", "int8-raw")) else 100


def jobs_of(codec: str, values: np.ndarray, sizes: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    """Return what is timed of a codec, and the payload's length."""
    stops = np.cumsum([0, *sizes]).tolist()
    coding = VectorCodec(codec, tuple(itertools.pairwise(stops)))
    seeds: Seeds = {"seed": 1, "rotation_seed": 2}
    payload = coding.encode(values, **seeds)
    added = coding.accumulator(2)
    return {
        "bytes": lambda: len(payload),
        "encode": lambda: coding.encode(values, **seeds),
        "decode": lambda: coding.decode(payload, **seeds),
        "add": lambda: added.add(payload, seed=1, weight=3),
    }


def jobs_of_zstandard(values: np.ndarray) -> dict[str, Callable[[], Any]]:
    """Return the same of `zstandard` at level 3 on the float32 bytes."""
    raw = values.tobytes()
    packed = zstandard.ZstdCompressor(level=3).compress(raw)
    return {
        "bytes": lambda: len(packed),
        "encode": lambda: zstandard.ZstdCompressor(level=3).compress(raw),
        "decode": lambda: zstandard.ZstdDecompressor().decompress(packed),
    }


def milliseconds(
    jobs: dict[str, dict[str, Callable[[], Any]]], repeats: int
) -> dict[str, dict[str, float]]:
    """Median processor time of each job of each codec, run by run in turns."""
    spent: dict[str, dict[str, list[float]]] = {}
    for run, (codec, own) in itertools.product(range(repeats + 1), jobs.items()):
        for name, job in own.items():
            if name == "bytes":
                continue
            job()  # what the one before left in the caches is not its own
            started = time.thread_time()
            job()
            if run:  # the first one warms up
                times = spent.setdefault(codec, {}).setdefault(name, [])
                times.append(1e3 * (time.thread_time() - started))
    return {
        codec: {name: statistics.median(times) for name, times in own.items()}
        for codec, own in spent.items()
    }


def errors(codec: str, count: int) -> dict[str, dict[str, float]]:
    """Squared error relative to the squared norm, and bits a value, on three distributions."""
    found = {}
    for name, draw in DISTRIBUTIONS.items():
        values = draw(np.random.default_rng(0), count).astype(np.float32)
        payload = encode_values(values, codec, [(0, count)], seed=1)
        decoded = decode_values(payload, codec, [(0, count)], seed=1)
        wanted = values.astype(np.float64)
        error = float(((decoded - wanted) ** 2).sum() / (wanted**2).sum())
        found[name] = {"nmse": error, "bits_per_value": 8 * len(payload) / count}
    return found


def show(row: dict[str, Any]) -> None:
    """Print a row of the table."""
    print(
        f"{row['codec']:20}{row['bits_per_value']:8.3f}"
        + "".join(
            f"{times.get(job, float('nan')):9.3f}"
            for times in row["milliseconds"].values()
            for job in JOBS
        )
        + "".join(f"  {one['nmse']:<9.3g}" for one in row["distributions"].values()),
        flush=True,
    )


def rows_of(times: int, repeats: int) -> list[dict[str, Any]]:
    """Measure every codec, on a vector some times as long as the recommended job's."""
    sizes = tuple(times * size for size in SIZES)
    values = np.random.default_rng(0).standard_normal(sum(sizes)).astype(np.float32) * 1e-3
    np.ones(1 << 24, dtype=np.uint8)  # as a process that loaded a model: malloc keeps what is freed
    jobs = {ZSTANDARD: jobs_of_zstandard(values)}
    jobs |= {codec: jobs_of(codec, values, sizes) for codec in CODECS}
    kernels: list[Choice] = ["numpy"]
    if importlib.util.find_spec("numba"):
        kernels.append("compiled")
    spent = {}
    for choice in kernels:
        use_kernels(choice)
        spent[choice] = milliseconds(jobs, repeats)
    return [
        {
            "codec": codec,
            "bits_per_value": 8 * own["bytes"]() / len(values),
            "milliseconds": {choice: spent[choice][codec] for choice in kernels},
            "distributions": {} if codec == ZSTANDARD else errors(codec, 400_000),
        }
        for codec, own in jobs.items()
    ]


def missed_bars(rows: list[dict[str, Any]], count: int) -> list[str]:
    """Return the jobs that took longer than their bars."""
    return [
        f"{row['codec']} {job} ({kernels})"
        for row in rows
        if row["codec"] != ZSTANDARD
        for kernels, times in row["milliseconds"].items()
        for job, spent in times.items()
        if 1e6 * spent / count > most_nanoseconds(row["codec"], job, kernels)
    ]


def main() -> int:
    """Measure, print, write, judge."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=int, default=1, help="how many times as long the vector is")
    parser.add_argument("--repeats", type=int, default=31, help="runs of which the median counts")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    count = arguments.times * sum(SIZES)
    rows = rows_of(arguments.times, arguments.repeats)
    kernels = list(rows[0]["milliseconds"])
    print(f"Milliseconds of {count:,} values by {' and by '.join(kernels)}; squared errors.")
    print(f"{'codec':20}{'bits':>8}" + "".join(f"{job:>9}" for _ in kernels for job in JOBS))
    for row in rows:
        show(row)
    missed = missed_bars(rows, count)
    if missed:
        print(f"Longer than their bar: {', '.join(missed)}.")
    if arguments.out:
        result = {
            "schema": 2,
            "benchmark": "codec_throughput",
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "status": "missed" if missed else "ok",
            "seed": 0,
            "threads": 1,
            "values": count,
            "repeats": arguments.repeats,
            "machine": machine(),
            "versions": versions()
            | {
                name: importlib.metadata.version(name)
                for name in ("zstandard", "numba")
                if importlib.util.find_spec(name)
            },
            "rows": rows,
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
