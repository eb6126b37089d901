"""A cell of the table of methods: one run, in a process of its own, and the file it leaves.

In:  a `Cell`.
Out: what the run's `result.json` holds, and the settings that decide it, in the cell's file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import tomli_w

from benchmarks.cells import ROOT, Work, commit, write_json
from benchmarks.table.file import Cell, Rate
from fedpet.config import Experiment
from fedpet.config.renamed import with_new_names
from fedpet.errors import ConfigError, FedpetError, RunError

SCHEMA = 1
_CHECKED = ("final_values_sha256", "metric", "total_bytes")


Run = Callable[[Cell, Path], dict[str, Any]]  # runs a cell, working in a folder


def work_of(
    run: Run,
    say: Callable[[str], None],
    show: Callable[[dict[str, Any]], str],
    fingerprint: Callable[[dict[str, Any]], dict[str, Any]],
) -> Work[Cell]:
    """How cells of runs are worked off: each in a folder of its own, that goes with it."""

    def in_folder(cell: Cell) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="fedpet-cell-") as folder:
            return run(cell, Path(folder))

    return Work(read_cell, in_folder, write_cell, show, fingerprint, say)


def read_cell(cell: Cell) -> dict[str, Any] | None:
    """The result of a finished cell; None where there is none yet.

    Raises:
        ConfigError: The file there is of a run with other settings.
    """
    if not cell.path.exists():
        return None
    try:
        content = json.loads(cell.path.read_text(encoding="utf-8"))
        stored, result = content["settings"], content["result"]
        rate = Rate.parse(content["learning_rate"], "learning_rate")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{str(cell.path)!r} is no cell of a table: {error!r}.") from None
    differing = _differing(stored, cell.settings())
    if content.get("runs") != cell.method.runs:
        differing.append(f"runs was {content.get('runs')!r}, is {cell.method.runs!r}")
    if differing or rate != cell.rate:
        raise ConfigError(
            f"the cell {cell.name} was run with other settings: "
            f"{'; '.join(differing) or 'its rate'}. Remove {str(cell.path)!r} to run it again, or "
            "name another folder with the table file's key 'results'."
        )
    assert isinstance(result, dict)
    return result


def write_cell(cell: Cell, result: dict[str, Any]) -> None:
    """Leave a finished cell, whole or not at all."""
    result = {**result, "run": {**result["run"], "method": cell.method.name}}
    content = {
        "schema": SCHEMA,
        "phase": cell.path.parent.name,
        "method": cell.method.name,
        "runs": cell.method.runs,
        "learning_rate": str(cell.rate),
        "commit": commit(),
        "settings": cell.settings(),
        "result": result,
    }
    write_json(cell.path, content)


def _differing(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What tells two settings apart; a key that one lacks has its default there."""
    try:
        before = Experiment.from_tables(with_new_names(stored)).to_tables()
    except FedpetError as error:
        return [f"they do not read any more ({error})"]
    after = Experiment.from_tables(wanted).to_tables()
    return [
        f"{stage}.{key} was {before[stage][key]!r}, is {value!r}"
        for stage, table in after.items()
        for key, value in table.items()
        if before[stage][key] != value
    ]


def run_in_process(cell: Cell, folder: Path, timeout_seconds: float) -> dict[str, Any]:
    """Run a cell by this package's own command line, in a process that ends with it.

    A run that learned nothing is a result too, and is returned as one.

    Raises:
        RunError: The run left no result. Its last lines are in the message.
    """
    out = folder / "run"
    settings = replace(cell.experiment, run=replace(cell.experiment.run, out=""))
    (folder / "cell.toml").write_text(tomli_w.dumps(settings.to_tables()), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks", "run", cell.method.runs]
    command += [str(folder / "cell.toml"), "--out", str(out)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((*filter(None, sys.path), str(ROOT))),
    }
    log = folder / "log.txt"
    with log.open("wb") as file:
        try:
            done = subprocess.run(
                command, stdout=file, stderr=file, env=environment, timeout=timeout_seconds
            )
            how = f"with exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            how = f"by us after {timeout_seconds:.0f} seconds"
    if not (out / "result.json").exists():
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-15:]
        raise RunError(
            f"the run of {cell.name} ended {how} and left no result. Its last lines:\n"
            + "\n".join(last)
        )
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert isinstance(result, dict)
    return result


def fingerprint(result: Mapping[str, Any]) -> dict[str, Any]:
    """What has to come out again, to the bit."""
    found = (
        result["final_values_sha256"],
        result["quality"]["final"],
        result["communication"]["total_bytes"],
    )
    return dict(zip(_CHECKED, found, strict=True))
