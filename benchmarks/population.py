"""Measure a large population: a million rows prepared, and rounds among a hundred thousand clients.

    taskset -c 0 python -m benchmarks.population [--out FILE]

rows      1,000,000 rows of 2,000 clients in one .jsonl file are read, split, dealt out and
          tokenised, by a process of its own, on one thread, from an empty cache and again from the
          full one. A text of 4 to 13 words is joined from two of the bundled film reviews, and ends
          with a number of its own: none comes twice, and each holds a new word.
clients   10 clients a round, drawn from 300 and from 100,000 of three rows each, without a local
          step: once by the default job's codec, once with error feedback and changes of a
          reference, where the server remembers what each client has. The runs take turns round by
          round in one process, with nodes in it: processor time of server and node together.
report    the time from the last round to `result.json`, and that of the page.

Figures are processor time; walls depend on what else the machine does. The peak is the kernel's,
of the whole process, libraries included; theirs alone is told beside it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.peak_memory import peak_bytes
from fedpet.backbone.pretrained import locate
from fedpet.config import BackboneConfig, ClientsConfig, DataConfig, Experiment
from fedpet.data import load_data
from fedpet.data.open_source import open_source
from fedpet.data.tokenize import load_tokenizer
from fedpet.run.callbacks import Callback

if TYPE_CHECKING:  # the process that loads rows imports no more than it needs
    from fedpet.protocol.ledger import Ledger, RoundRecord

EXPERIMENTS = Path(__file__).parents[1] / "simulations" / "experiments"
CODECS = {
    "default": (),
    "feedback and changes": (
        "codec.error-feedback=true",
        "codec.downlink-mode=delta",
    ),
}
ROWS_A_CLIENT = 3
WARM_UP = 3  # rounds, in which libraries are loaded


def write_rows(path: Path, num_rows: int, num_clients: int) -> None:
    """Write rows of made-up reviews, the same each time."""
    table = open_source("bundled").read("train")
    names = ("text", "label")
    texts, labels = (list(table.column(name, name, "the bundled data set")) for name in names)
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            one, other = rng.randrange(len(texts)), rng.randrange(len(texts))
            first, second = texts[one].split(), texts[other].split()
            words = first[: rng.randrange(1, len(first) + 1)]
            words += second[rng.randrange(len(second)) :]
            words = words[: rng.randrange(4, 14)]
            row = {
                "text": f"{' '.join(words)} {number}",
                "label": labels[one],
                "client": f"client {number % num_clients:06d}",
            }
            file.write(json.dumps(row) + "\n")


def _libraries() -> dict[str, Any]:
    """Measure the memory of what any start from an empty cache loads."""
    import pyarrow.compute  # noqa: F401

    load_tokenizer(locate(BackboneConfig()))
    return {"megabytes": peak_bytes() / 1e6}


def _prepare_rows(path: Path, cache: Path) -> dict[str, Any]:
    """Load rows, and measure."""
    before = time.process_time()
    data = load_data(
        DataConfig(source=str(path), eval_split="", eval_fraction=0.05),
        ClientsConfig(partition="column", client_column="client", min_rows=1),
        locate(BackboneConfig()),
        cache=cache,
    )
    return {
        "cpu_seconds": time.process_time() - before,
        "peak_megabytes": peak_bytes() / 1e6,
        "rows": len(data.train) + len(data.evaluation),
        "tokens": int(data.train.offsets[-1] + data.evaluation.offsets[-1]),
        "clients": len(data.clients),
    }


def in_process_of_its_own(function: Callable[..., Any], *given: Any) -> Any:
    """Call a function of this module in a new Python."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, given)


def measure_rows(num_rows: int, num_clients: int) -> dict[str, Any]:
    """Measure the preparation of rows."""
    with tempfile.TemporaryDirectory() as folder:
        path, cache = Path(folder) / "rows.jsonl", Path(folder) / "cache"
        write_rows(path, num_rows, num_clients)
        found = {
            name: in_process_of_its_own(_prepare_rows, path, cache)
            for name in ("empty cache", "full cache")
        }
        cache_bytes = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
        return {
            **found,
            "file_megabytes": path.stat().st_size / 1e6,
            "cache_megabytes": cache_bytes / 1e6,
            "libraries": in_process_of_its_own(_libraries),
        }


class Turns:
    """Let threads go on one at a time, a round each."""

    def __init__(self, num_threads: int) -> None:
        self._waiting = list(range(num_threads))
        self._changed = threading.Condition()

    def wait(self, number: int) -> None:
        """Return when it is the thread's turn."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting[0] == number)

    def end(self, number: int, *, last: bool = False) -> None:
        """Give the turn to the next thread."""
        with self._changed:
            self._waiting.remove(number)
            if not last:
                self._waiting.append(number)
            self._changed.notify_all()


class Clock(Callback):
    """Note the processor time of rounds, of which one goes on at a time."""

    def __init__(self, turns: Turns, number: int) -> None:
        self.rounds: list[float] = []
        self.start_seconds = self.end_seconds = 0.0
        self._turns, self._number = turns, number
        self._since = time.process_time()

    def on_stage(self, text: str) -> None:
        """Do nothing: stages are not timed."""

    def on_round_end(self, record: RoundRecord, ledger: Ledger) -> None:
        """Note a round; round 0 is the start, with the evaluation."""
        spent = time.process_time() - self._since
        if record.round:
            self.rounds.append(spent)
        else:
            self.start_seconds = spent
        self._turns.end(self._number)
        self._turns.wait(self._number)
        self._since = time.process_time()

    def on_run_end(self, result: Any, folder: Path) -> None:
        """Note the time since the last round."""
        self.end_seconds = time.process_time() - self._since


def _run(home: Path, clients: int, rounds: int, codec: Sequence[str], clock: Clock) -> Any:
    """Run a federation of so many clients in this process."""
    from fedpet.client.node_config import NodeConfig
    from fedpet.report.loading import read_report
    from fedpet.report.page import write_page
    from fedpet.run.federate import federate, prepare
    from fedpet.run.local_grid import LocalGrid
    from fedpet.run.run_folder import new_run_folder

    home.mkdir()
    write_rows(home / "rows.jsonl", clients * ROWS_A_CLIENT, clients)
    settings = [
        f"data.source='{home}/rows.jsonl'", "data.eval-split=''", "data.max-eval-rows=64",
        "clients.partition=column", "clients.client-column=client", "clients.min-rows=1",
        "strategy.clients-per-round=10", f"strategy.num-rounds={rounds}",
        f"strategy.evaluate-every={rounds}", "training.local-epochs=0",
        f"run.out='{home}/run'", f"run.cache='{home}/cache'", *codec,
    ]  # fmt: skip
    experiment = Experiment.from_file(EXPERIMENTS / "film-reviews.toml", settings)
    prepared, out = prepare(experiment, clock), new_run_folder(experiment)
    grid = LocalGrid.of(NodeConfig.from_experiment(experiment), 1)
    result = federate(grid, prepared, out, clock)
    since = time.process_time()
    write_page(read_report(out.path), out.path / "report.html")
    return {
        "clients": result["data"]["clients"],
        "round_ms": 1e3 * statistics.median(clock.rounds[WARM_UP:]),
        "rounds_ms": [round(1e3 * seconds, 2) for seconds in clock.rounds],
        "start_seconds": clock.start_seconds,
        "end_seconds": clock.end_seconds,
        "page_seconds": time.process_time() - since,
    }


def measure_rounds(sizes: Sequence[int], rounds: int, codec: Sequence[str]) -> list[Any]:
    """Run federations of these numbers of clients, a round of each after the other."""
    turns = Turns(len(sizes))
    found: dict[int, Any] = {}

    def one(number: int) -> None:
        turns.wait(number)
        try:
            home = Path(folder) / str(number)
            found[number] = _run(home, sizes[number], rounds, codec, Clock(turns, number))
        finally:
            turns.end(number, last=True)

    with tempfile.TemporaryDirectory() as folder:
        threads = [threading.Thread(target=one, args=(n,)) for n in range(len(sizes))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return [found[number] for number in range(len(sizes))]


def main() -> None:
    """Measure, print, and write the file of --out."""
    from fedpet.protocol.flower_compat.flower_simulation import quiet_flower
    from fedpet.run.run_folder import machine, versions

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="0 leaves them out")
    parser.add_argument("--row-clients", type=int, default=2000)
    parser.add_argument("--clients", type=int, nargs="*", default=[300, 100_000])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, help="write the measurement to this JSON file")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    if arguments.rows:
        found["rows"] = measure_rows(arguments.rows, arguments.row_clients)
    if arguments.clients:
        with quiet_flower():
            found["rounds"] = {
                name: measure_rounds(arguments.clients, arguments.rounds, codec)
                for name, codec in CODECS.items()
            }
    found |= {"versions": versions(), "machine": machine()}
    print(json.dumps(found, indent=2))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
