"""Run the cells of a table: pieces of work that each leave one file.

A file holds the settings that decide its cell's outcome. A cell whose file is there is not run
again; a file of other settings is refused, never overwritten.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.rate import Rate
from fedpet.errors import ConfigError, FedpetError
from fedpet.run.run_folder import machine, versions
from fedpet.utils.atomic_write import atomic_write

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = 1
RUN_AGAIN = "Remove {!r} to run it again, or name another folder with the table's 'results'."

Result = dict[str, Any]
Run = Callable[["Cell"], Result]


@dataclass(frozen=True)
class Cell(ABC):
    """Define one piece of work and its file, RESULTS/PHASE/NAME.json.

    Attributes:
        path: The file.
        rate: Learning rates, a point of the grid; None where nothing is trained.
        seed: Of the run.
        needs: The file of a structure that must be there before it runs.
    """

    path: Path
    rate: Rate | None
    seed: int
    needs: Path | None

    @property
    def name(self) -> str:
        """PHASE/NAME."""
        return f"{self.path.parent.name}/{self.path.stem}"

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return the settings that decide the outcome, by stage."""

    @abstractmethod
    def complete_settings(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """Fill in the default of every key that these settings lack."""

    @abstractmethod
    def run(self) -> Result:
        """Do the work."""

    @abstractmethod
    def score(self, result: Result) -> float | None:
        """Return the metric; None where nothing was learned."""

    @property
    def greater_is_better(self) -> bool:
        """Tell how scores compare."""
        return True

    @abstractmethod
    def fingerprint(self, result: Result) -> dict[str, Any]:
        """Return what a second run must give again, to the bit."""

    def labels(self) -> dict[str, Any]:
        """Return what the file says of the cell beside its settings."""
        return {}

    def show(self, result: Result) -> str:
        """Describe a result in a few words."""
        return f"{self.score(result):.4f}"

    def read(self) -> Result | None:
        """Read the result; None where there is none yet.

        Raises:
            ConfigError: The file is no cell, or one of other settings.
        """
        if not self.path.exists():
            return None
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            stored, result = content["settings"], dict(content["result"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{str(self.path)!r} is no cell of a table: {error!r}.") from None
        try:
            before = self.complete_settings(stored)
        except FedpetError as error:
            differing = [f"its settings do not read any more ({error})"]
        else:
            differing = list(_differing(before, self.complete_settings(self.settings())))
        runs = self.labels().get("runs")
        if content.get("runs") != runs:
            differing.append(f"runs was {content.get('runs')!r}, is {runs!r}")
        if differing:
            raise ConfigError(
                f"the cell {self.name} was run with other settings: {'; '.join(differing)}. "
                + RUN_AGAIN.format(str(self.path))
            )
        return result

    def write(self, result: Result) -> None:
        """Write the file, whole or not at all."""
        content = {"schema": SCHEMA, "phase": self.path.parent.name, **self.labels()}
        content |= {"settings": self.settings(), "result": result, **_provenance()}
        write_json(self.path, content)


def complete(
    cells: Sequence[Cell], say: Callable[[str], None], *, jobs: int = 1, run: Run | None = None
) -> None:
    """Run the cells that are missing.

    Args:
        cells: All of them; every file is read first, so that a changed setting is refused at once.
        say: Prints one line.
        jobs: Cells at once, each in a process of its own where there are several.
        run: Runs a cell; by default `Cell.run`.
    """
    missing = [cell for cell in cells if cell.read() is None]
    if len(missing) < len(cells):
        say(f"{len(cells) - len(missing)} of {len(cells)} cells are there already")
    started = time.perf_counter()
    for number, (cell, result, seconds) in enumerate(_run_all(missing, say, jobs, run), 1):
        cell.write(result)
        left = (time.perf_counter() - started) / number * (len(missing) - number) / 60
        say(
            f"[{number}/{len(missing)}] {cell.name}: {cell.show(result)}, {seconds:.0f} s; about "
            f"{left:.0f} min left"
        )


def check(
    cells: Sequence[Cell],
    count: int,
    notes: Path,
    say: Callable[[str], None],
    *,
    run: Run | None = None,
) -> bool:
    """Run a random sample of the finished cells again, and compare to the bit.

    Args:
        cells: Finished or not.
        count: Size of the sample.
        notes: File to which the outcome of each comparison is appended.
        say: Prints one line.
        run: Runs a cell; by default `Cell.run`.

    Raises:
        ConfigError: No cell is finished.
    """
    finished = [cell for cell in cells if cell.read() is not None]
    if not finished:
        raise ConfigError("there is no finished cell to check.")
    all_same = True
    for cell in random.SystemRandom().sample(finished, min(count, len(finished))):
        before = cell.fingerprint(cell.read() or {})
        after = cell.fingerprint((run or _run)(cell))
        same = before == after
        all_same &= same
        checks = json.loads(notes.read_text(encoding="utf-8")) if notes.exists() else []
        outcome = {"cell": cell.name, "same": same, "before": before, "after": after}
        date = time.strftime("%Y-%m-%d", time.gmtime())
        write_json(notes, [*checks, {**outcome, "date": date, **_provenance()}])
        say(f"check {cell.name}: {'the same' if same else f'{before} before, {after} now'}")
    return all_same


def _run_all(
    cells: Sequence[Cell], say: Callable[[str], None], jobs: int, run: Run | None
) -> Iterator[tuple[Cell, Result, float]]:
    """Yield each cell with its result and seconds, as they come."""
    for cell in cells if jobs == 1 else ():
        say(f"{cell.name} ...")
        started = time.perf_counter()
        result = (run or _run)(cell)
        yield cell, result, time.perf_counter() - started
    if jobs == 1:
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        started = time.perf_counter()
        running = {pool.submit(run or _run, cell): cell for cell in cells}
        try:
            for future in as_completed(running):
                yield running[future], future.result(), time.perf_counter() - started
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _run(cell: Cell) -> Result:
    """Run one cell.

    Raises:
        ConfigError: Its structure has not been made.
    """
    if cell.needs is not None and not cell.needs.exists():
        raise ConfigError(
            f"{cell.name} trains the structure {cell.needs.stem!r}, which has not been made. Run "
            "the phase 'structures' first."
        )
    return cell.run()


def _differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    for stage, new in after.items():
        old = before.get(stage)
        if isinstance(new, dict) and isinstance(old, dict):
            for key, value in new.items():
                if old.get(key) != value:
                    yield f"{stage}.{key} was {old.get(key)!r}, is {value!r}"
        elif old != new:
            yield f"{stage} was {old!r}, is {new!r}"


def _provenance() -> dict[str, Any]:
    return {"commit": commit(), "versions": versions(), "machine": machine()}


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, (json.dumps(content, indent=2) + "\n").encode())


def commit() -> str:
    """Return the checkout's commit; "-dirty" marks changed files."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
