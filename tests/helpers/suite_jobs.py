"""A suite of two small data sets whose runs are made up."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import tomli_w

from benchmarks.cell import Cell
from benchmarks.suite import Suite
from benchmarks.suite_cell import SuiteCell
from benchmarks.suite_file import read_suite


class Pretend:
    """Stands in for a run: counts them, and gives the metric that `score` says."""

    def __init__(self, score: Callable[[SuiteCell], float | None] = lambda cell: 0.5) -> None:
        self.ran: list[str] = []
        self._score = score

    def __call__(self, cell: Cell) -> dict[str, Any]:
        assert isinstance(cell, SuiteCell)
        self.ran.append(cell.name)
        final = self._score(cell)
        run = {"method": cell.method, "seed": cell.seed, "status": "ok"}
        time = {"processor_seconds": 10.0 * len(cell.method)}
        if final is None:
            return {"run": {**run, "status": "nothing learned"}, "why": "it is", "time": time}
        size = 1000 * len(cell.method)
        return {
            "run": run,
            "quality": {"metric": "accuracy", "final": final, "majority_baseline": 0.4,
                        "feature": "mean of tokens"},
            "model": {"communicated_values": size},
            "communication": {"total_bytes": size, "dense_fedavg_total_bytes": 10**7},
            "curve": [[0, 0.4, 0], [1, final - 0.02, size / 2], [2, final, size]],
            "final_values_sha256": f"{cell.name} {final}",
            "time": time,
        }  # fmt: skip


def tables(**changes: Any) -> dict[str, Any]:
    """A suite's file."""
    return {
        "tune-seed": 3,
        "seeds": [0, 1, 2],
        "most-rates": 5,
        "base": {"strategy": {"num-rounds": 2}, "mask": {"enabled": False}},
        "datasets": {
            "films": {"tune": ["data.eval-split=validation"], "final": ["data.eval-split=test"]},
            "letters": {
                "set": ["data.source=letters"],
                "tune": ["data.eval-split="],
                "final": ["data.eval-split=test"],
                "seconds": 30,
            },
        },
        "methods": {
            "probe": {},
            "full": {"rate": 0.001},
            "mask": {"runs": "fedpet", "rate": 0.1, "beside": ["head=0.03"],
                     "set": ["mask.enabled=true"]},
            "mask-lossless": {"runs": "fedpet", "rates-of": "mask",
                              "set": ["mask.enabled=true", "codec.uplink=float32"]},
        },
        "work": [
            {"datasets": ["films"], "methods": ["probe", "mask", "full", "mask-lossless"]},
            {"datasets": ["letters"], "methods": ["mask"]},
        ],
        **changes,
    }  # fmt: skip


def suite_of(where: Path, run: Pretend | None = None, **options: Any) -> Suite:
    """Write the file, or `content`, and read it."""
    path = where / "small.toml"
    path.write_text(tomli_w.dumps(options.pop("content", None) or tables()), encoding="utf-8")
    return read_suite(path, run=run, **options)


def letters(folder: Path) -> dict[str, Any]:
    """Rows and a small model in a folder, and the experiment over them."""
    rows = tiny.make_rows(folder / "sets" / "letters")
    shutil.copy(rows / "test.jsonl", rows / "validation.jsonl")
    return {
        "backbone": {"model": str(tiny.make_backbone(folder / "backbone"))},
        "data": {"max-length": 16},
        "clients": {"client-column": "client", "min-rows": 2},
        "structure": {"preset": "none"},
        "mask": {"enabled": False, "density": 0.05},
        "training": {"batch-size": 4},
        "strategy": {"num-rounds": 1, "clients-per-round": 2},
        "run": {"cache": str(folder / "cache")},
    }
