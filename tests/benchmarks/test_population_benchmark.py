"""The benchmark of a population: rows that are the same each time, runs that take turns."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from benchmarks.population import Turns, write_rows


def test_rows_are_the_same_each_time_and_of_as_many_clients_as_asked_for(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_rows(tmp_path / name, 60, 7)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "a").read_text().splitlines()]
    assert len(rows) == len({row["text"] for row in rows}) == 60
    assert len({row["client"] for row in rows}) == 7


def test_threads_go_on_one_at_a_time_and_one_that_ends_holds_nobody_up() -> None:
    turns, order = Turns(3), []

    def work(number: int) -> None:
        turns.wait(number)
        for at in range(number + 1):
            order.append((at, number))
            turns.end(number)
            turns.wait(number)
        turns.end(number, last=True)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert order == [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)]
