"""Measure values a second of each codec on one core, with bits and error.

    python -m benchmarks.codec_throughput [--values N] [--out FILE.json]

Beside the codecs stands `zstandard` at level 3 on the same float32 bytes, in the same run, to
compare machines by. Times are the processor's, medians of several
runs after one to warm up; wall times stand beside them. One thread works: neither the codecs nor
`zstandard` start others. Behind the bars stand the squared errors on Gaussian, Laplace and
Student-t3 vectors, relative to the squared norm. Exits with 1 where a codec misses its bar.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from fedpet.codec import decode_values, encode_values
from fedpet.codec.spec import CODEC_IDS
from fedpet.run.run_folder import machine, versions

PLAIN = ("float32", "bfloat16", "float32-raw", "bfloat16-raw", "int8-raw")
EXTRA = ("topk-0.1+int8", "topk-0.1+eden-4")
DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "gaussian": lambda rng, count: rng.standard_normal(count),
    "laplace": lambda rng, count: rng.laplace(size=count),
    "student-t3": lambda rng, count: rng.standard_t(3, size=count),
}


def least_millions_a_second(codec: str) -> int:
    """Return the bar: 50 for floats and stored int8, 5 with a rotation, 10 for the others."""
    if codec in PLAIN:
        return 50
    return 5 if "eden" in codec else 10


def median_seconds(job: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median processor and wall time of a run."""
    job()
    spent, waited = [], []
    for _ in range(repeats):
        wall, processor = time.perf_counter(), time.process_time()
        job()
        spent.append(time.process_time() - processor)
        waited.append(time.perf_counter() - wall)
    return statistics.median(spent), statistics.median(waited)


def measure(codec: str, values: np.ndarray, repeats: int) -> dict[str, Any]:
    """Speed and bits of one codec on one vector, in two groups."""
    count = len(values)
    groups = [(0, count - count // 10), (count - count // 10, count)]
    payload = encode_values(values, codec, groups, seed=1)
    encode, encode_wall = median_seconds(
        lambda: encode_values(values, codec, groups, seed=1), repeats
    )
    decode, decode_wall = median_seconds(
        lambda: decode_values(payload, codec, groups, seed=1), repeats
    )
    return {
        "codec": codec,
        "bits_per_value": 8 * len(payload) / count,
        "encode_millions_per_second": count / encode / 1e6,
        "decode_millions_per_second": count / decode / 1e6,
        "encode_wall_millions_per_second": count / encode_wall / 1e6,
        "decode_wall_millions_per_second": count / decode_wall / 1e6,
        "bar_millions_per_second": least_millions_a_second(codec),
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


def yardstick(values: np.ndarray, repeats: int) -> dict[str, Any]:
    """zstandard at level 3 on the float32 bytes."""
    raw = values.tobytes()
    packed = zstandard.ZstdCompressor(level=3).compress(raw)
    encode, _ = median_seconds(lambda: zstandard.ZstdCompressor(level=3).compress(raw), repeats)
    decode, _ = median_seconds(lambda: zstandard.ZstdDecompressor().decompress(packed), repeats)
    return {
        "codec": "zstandard level 3",
        "bits_per_value": 8 * len(packed) / len(values),
        "encode_millions_per_second": len(values) / encode / 1e6,
        "decode_millions_per_second": len(values) / decode / 1e6,
    }


def show(row: dict[str, Any]) -> None:
    """Print a row of the table."""
    print(
        f"{row['codec']:20}{row['bits_per_value']:8.3f}"
        f"{row['encode_millions_per_second']:9.1f}{row['decode_millions_per_second']:9.1f}"
        f"{row.get('bar_millions_per_second', ''):>6}"
        + "".join(f"  {one['nmse']:<9.3g}" for one in row.get("distributions", {}).values()),
        flush=True,
    )


def main() -> int:
    """Measure, print, write, judge."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--values", type=int, default=1_000_000, help="how long the vector is")
    parser.add_argument("--repeats", type=int, default=7, help="runs of which the median counts")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    values = np.random.default_rng(0).standard_normal(arguments.values).astype(np.float32) * 1e-3
    print("Million values a second, and squared errors on three distributions.")
    print(f"{'codec':20}{'bits':>8}{'encode':>9}{'decode':>9}{'bar':>6}")
    rows = [yardstick(values, arguments.repeats)]
    show(rows[0])
    for codec in (*CODEC_IDS, *(f"{base}-raw" for base in CODEC_IDS), *EXTRA):
        row = measure(codec, values, arguments.repeats)
        rows.append(row | {"distributions": errors(codec, 400_000)})
        show(rows[-1])
    missed = [
        row["codec"]
        for row in rows[1:]
        if min(row["encode_millions_per_second"], row["decode_millions_per_second"])
        < row["bar_millions_per_second"]
    ]
    if missed:
        print(f"Below their bar: {', '.join(missed)}.")
    if arguments.out:
        result = {
            "schema": 1,
            "benchmark": "codec_throughput",
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "status": "missed" if missed else "ok",
            "seed": 0,
            "threads": 1,
            "values": arguments.values,
            "repeats": arguments.repeats,
            "machine": machine(),
            "versions": versions()
            | {name: importlib.metadata.version(name) for name in ("zstandard", "constriction")},
            "rows": rows,
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
