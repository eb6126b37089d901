"""Cells: pieces of work that each leave one file, run where it is missing and never twice.

In:  cells, and how one is read, run and written.
Out: a file a cell; and, of a random sample that is run again, whether it came out the same.

What a cell is, is up to the table that it belongs to: this module looks at its name and path.
"""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from fedpet.config.renamed import with_new_names
from fedpet.errors import ConfigError
from fedpet.run.run_folder import machine, versions
from fedpet.utils.atomic_write import atomic_write

ROOT = Path(__file__).resolve().parents[1]


class Named(Protocol):
    """What every cell has."""

    @property
    def name(self) -> str:
        """As people see it."""

    @property
    def path(self) -> Path:
        """Of its file."""


C = TypeVar("C", bound=Named)


@dataclass(frozen=True)
class Work(Generic[C]):
    """How the cells of one table are worked off.

    Attributes:
        read: The result of a finished cell, None where there is none yet; refuses a file of
            other settings.
        run: Runs a cell and gives its result.
        write: Leaves a result, whole or not at all.
        show: A result in a few words.
        fingerprint: What of a result has to come out again, to the bit.
        say: Shows one line.
    """

    read: Callable[[C], dict[str, Any] | None]
    run: Callable[[C], dict[str, Any]]
    write: Callable[[C, dict[str, Any]], None]
    show: Callable[[dict[str, Any]], str]
    fingerprint: Callable[[dict[str, Any]], dict[str, Any]]
    say: Callable[[str], None]

    def complete(self, cells: Sequence[C], *, jobs: int = 1) -> None:
        """Run the cells that are missing, `jobs` at once."""
        # All files are looked at before the first run: a changed setting is told at once.
        missing = [cell for cell in cells if self.read(cell) is None]
        if len(missing) < len(cells):
            self.say(f"{len(cells) - len(missing)} of {len(cells)} cells are there already")
        seconds: list[float] = []

        def one(number: int, cell: C) -> None:
            left = ""
            if seconds:
                mean = sum(seconds) / len(seconds)
                left = f" about {mean * (len(missing) - number + 1) / jobs / 60:.0f} min left"
            self.say(f"[{number}/{len(missing)}] {cell.name} ...{left}")
            started = time.perf_counter()
            result = self.run(cell)
            self.write(cell, result)
            seconds.append(time.perf_counter() - started)
            self.say(
                f"[{number}/{len(missing)}] {cell.name}: {self.show(result)}, {seconds[-1]:.0f} s"
            )

        if jobs == 1:
            for number, cell in enumerate(missing, 1):
                one(number, cell)
            return
        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(one, n, cell) for n, cell in enumerate(missing, 1)]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def check(self, cells: Sequence[C], count: int, notes: Path) -> bool:
        """Run a random sample of the finished cells again and compare.

        Args:
            cells: Finished or not.
            count: Of the sample; all where there are fewer.
            notes: What came out is appended to this file.

        Returns:
            Whether all are the same to the bit.

        Raises:
            ConfigError: No cell is finished.
        """
        finished = [cell for cell in cells if self.read(cell) is not None]
        if not finished:
            raise ConfigError("there is no finished cell to check.")
        all_same = True
        for cell in random.SystemRandom().sample(finished, min(count, len(finished))):
            before = self.fingerprint(self.read(cell) or {})
            after = self.fingerprint(self.run(cell))
            same = before == after
            all_same &= same
            _note(notes, {"cell": cell.name, "same": same, "before": before, "after": after})
            self.say(
                f"check {cell.name}: {'the same' if same else f'{before} before, {after} now'}"
            )
        return all_same


def _note(path: Path, check: dict[str, Any]) -> None:
    checks = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    date = time.strftime("%Y-%m-%d", time.gmtime())
    where = {"commit": commit(), "versions": versions(), "machine": machine()}
    write_json(path, [*checks, {**check, "date": date, **where}])


def write_json(path: Path, content: Any) -> None:
    """Leave a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, (json.dumps(content, indent=2) + "\n").encode())


def commit() -> str:
    """What the checkout stands at; "-dirty" says that something in it had been changed."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def with_new_fields(stage: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stage's fields, as a cell of before has them, under their present names."""
    (table,) = with_new_names({stage: dict(fields)}).values()
    return {key.replace("-", "_"): value for key, value in table.items()}
