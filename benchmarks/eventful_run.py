"""Disturb a run on three real nodes, and hold its books against what was done to them.

While the rounds go on, one event after another:

    barn      its file grows by a few reviews
    attic     its disk is full for a round: a real one of a few MiB, and ENOSPC
    cellar    is killed with SIGKILL, and started again as its systemd unit does
    barn      gets a new key, by `fedpet nodes --rotate`, `register.sh` and a restart

Every event must stand in `result.json`, `rounds.jsonl` and `report.html` by the node's name, and
all nodes must take part in the last round. The final values are held against a replay of the same
participants and rows by round, in this process (benchmarks/replay.py).
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.real_nodes import RealNodes
from benchmarks.replay import replay, take_part
from fedpet.config import Experiment

GROWS, FULL, KILLED = "barn", "attic", "cellar"  # the first one's key is rotated as well
DISK_MIB = 16
MORE_ROWS = 8
ROWS = 32  # about so many of each node, those of whole films
SETTINGS = {  # of its clients all are drawn, and each node stores the reference of each round
    "strategy.clients-per-round": 1000,
    "strategy.quorum": 0.2,
    "codec.downlink-mode": "delta",
}
# What the books must have, in this order for each node.
EXPECTED = (
    (GROWS, "rows changed"),
    (GROWS, "registered again"),
    (FULL, "suspended"),
    (FULL, "registered"),
    (KILLED, "disconnected"),
    (KILLED, "registered"),
    (GROWS, "key replaced"),
    (GROWS, "registered"),
)


class RunIsOver(Exception):
    """The run ended before an event was done."""


@dataclass
class Disturbance:
    """Do the events while a run goes on.

    Attributes:
        real: The nodes.
        run: Name of the run's folder.
        rounds: Of the run.
        full_disk: A node has a disk of its own, which can be filled.
        tell: Is called with what is done.
        trouble: Why not all was done; "" if all was.
        starts: How often the killed node was started until it was there.
    """

    real: RealNodes
    run: str
    rounds: int
    full_disk: bool
    tell: Callable[[str], None]
    trouble: str = field(default="not begun", init=False)
    starts: int = field(default=0, init=False)

    def __call__(self) -> None:
        """Do all of them."""
        try:
            self._do_all()
            self.trouble = ""
        except (RunIsOver, RuntimeError, OSError) as error:
            self.trouble = f"{type(error).__name__}: {error}"

    def _do_all(self) -> None:
        real, place = self.real, self.real.folder / "nodes"
        self._wait(lambda: len(self._lines()) > 1)
        self.tell(f"{GROWS}: its file grows by {MORE_ROWS} rows")
        grow(place / GROWS / "data.jsonl")
        self._wait_for(GROWS, "registered again")
        if self.full_disk:
            self.tell(f"{FULL}: its disk is full")
            real.fill_disk(FULL)
            self._wait_for(FULL, "suspended")
            real.empty_disk(FULL)
            self.tell(f"{FULL}: its disk has room again")
            self._wait_for(FULL, "registered")
        self.tell(f"{KILLED}: SIGKILL to its processes")
        real.kill(KILLED)
        self.starts = real.keep_node(KILLED, lambda: self._has(KILLED, "registered"))
        self.tell(f"{GROWS}: its key is replaced")
        done = real.call("fedpet", "nodes", real.folder, "--rotate", GROWS)
        if done.returncode:
            raise RuntimeError(f"fedpet nodes --rotate failed: {done.stderr}")
        real.register()
        real.stop(GROWS)
        real.start_node(GROWS)
        self._wait_for(GROWS, "registered")

    def _lines(self) -> list[dict[str, Any]]:
        lines = self.real.rounds(self.run)
        if len(lines) > self.rounds:
            raise RunIsOver(f"after {self.rounds} rounds; give it more")
        return lines

    def _has(self, node: str, event: str) -> bool:
        return (node, event) in told(self._lines())

    def _wait_for(self, node: str, event: str) -> None:
        self._wait(lambda: self._has(node, event))

    @staticmethod
    def _wait(found: Callable[[], bool]) -> None:
        while not found():
            time.sleep(0.1)


def told(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return node and event of all that the lines of a run tell."""
    return [(e["node"], e["event"]) for line in lines for e in line.get("events", ())]


def grow(path: Path) -> None:
    """Add rows to a node's file, by renaming a finished one as the guide says."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:MORE_ROWS]]
    more = [json.dumps({**row, "text": f"Seen again: {row['text']}"}) for row in rows]
    new = path.with_name("data.new")
    new.write_text("\n".join([*lines, *more]) + "\n", encoding="utf-8")
    os.replace(new, path)


def shrink(path: Path) -> int:
    """Leave a node's file the first films, with `ROWS` rows or a few more; return the clients."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    count = Counter(row["film"] for row in rows)
    left: dict[str, int] = {}
    for film in dict.fromkeys(row["film"] for row in rows):
        if sum(left.values()) >= ROWS:
            break
        left[film] = count[film]
    new = path.with_name("data.new")
    kept = [json.dumps(row) for row in rows if row["film"] in left]
    new.write_text("\n".join(kept) + "\n", encoding="utf-8")
    os.replace(new, path)
    return len(left)


def with_settings(experiment: Experiment, rounds: int, clients: int) -> Experiment:
    """Return the experiment of the eventful run."""
    tables = experiment.to_tables()
    for key, value in {
        **SETTINGS,
        "strategy.num-rounds": rounds,
        "strategy.evaluate-every": rounds,
    }.items():
        stage, _, name = key.partition(".")
        tables[stage][name] = value
    changed = Experiment.from_tables(tables)
    return replace(changed, clients=replace(changed.clients, num_clients=clients))


def overrides(experiment: Experiment) -> list[str]:
    """Return that experiment as `run.sh` takes it."""
    config = experiment.to_run_config()
    keys = [*SETTINGS, "strategy.num-rounds", "strategy.evaluate-every", "clients.num-clients"]
    return [f"{k.replace('.', '-')}={json.dumps(config[k.replace('.', '-')])}" for k in keys]


def replayed(
    experiment: Experiment, real: RealNodes, lines: Sequence[Mapping[str, Any]], folder: Path
) -> str:
    """Return the hash of the same run in this process."""
    folder.mkdir()
    places = {name: real.folder / "nodes" / name for name in (FULL, GROWS, KILLED)}
    for name, place in places.items():
        shutil.copy(place / "before.jsonl", folder / f"{name}.jsonl")
    return replay(experiment, places, lines, folder, lambda name: grow(folder / f"{name}.jsonl"))


def missing(lines: Sequence[Mapping[str, Any]], *, full_disk: bool) -> list[str]:
    """Return the expected events that the books do not tell, each after the ones before it."""
    rest, absent = told(lines), []
    for node, event in EXPECTED:
        if node == FULL and not full_disk:
            continue
        if (node, event) in rest:
            rest = rest[rest.index((node, event)) + 1 :]
        else:
            absent.append(f"{node}: {event}")
    return absent


def took_part_last(lines: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the nodes whose updates the last round used."""
    return take_part(lines[-1])[1]
