"""Ctrl-C and SIGTERM: one sentence that is true, the right exit code, and a clean end."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from search_runs import SEARCH
from tiny import Silent

from fedpet.config import Experiment
from fedpet.errors import RunError, RunInterrupted
from fedpet.run import interrupts, ray_engine
from fedpet.run.interrupts import Heeding, stoppable
from fedpet.run.local_grid import LocalGrid
from fedpet.run.progress import SearchBar

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
by_signal = pytest.mark.parametrize("number", CODES)


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0)  # a signal is handled between two instructions of the main thread


def stopped(number: int, command: Callable[[], object]) -> str:
    """Return what a command that a signal ends says; its exit code is checked."""
    before = [signal.getsignal(each) for each in CODES]
    with pytest.raises(RunInterrupted) as caught:
        command()
    assert caught.value.exit_code == CODES[signal.Signals(number)]
    assert [signal.getsignal(each) for each in CODES] == before
    return str(caught.value)


@by_signal
def test_a_signal_is_told_with_how_to_go_on_and_its_exit_code(number: int) -> None:
    def command() -> None:
        with stoppable(lambda: "Go on."):
            send(number)

    assert stopped(number, command) == "Interrupted. Go on."


@by_signal
def test_a_second_signal_does_not_cut_short_what_is_cleared_away(number: int) -> None:
    cleared = []

    def command() -> None:
        with stoppable(lambda: "Go on."):
            try:
                send(number)
            finally:
                send(number)
                cleared.append(True)

    assert stopped(number, command) == "Interrupted. Go on."
    assert cleared


def test_of_two_signals_sigterm_gives_the_exit_code() -> None:
    def command() -> None:
        with stoppable(lambda: "Go on."):
            try:
                send(signal.SIGINT)
            finally:
                send(signal.SIGTERM)

    stopped(signal.SIGTERM, command)


def test_a_third_signal_is_heard_where_clearing_away_hangs() -> None:
    def command() -> None:
        with stoppable(lambda: "Go on."):
            try:
                send(signal.SIGINT)
            finally:
                send(signal.SIGINT)
                send(signal.SIGINT)
                pytest.fail("the third was passed over")

    stopped(signal.SIGINT, command)


@by_signal
def test_a_signal_whose_exception_is_lost_is_sent_again_until_something_ends(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interrupts, "PATIENCE", 0.05)

    def command() -> None:
        with stoppable(lambda: "Go on."):
            with contextlib.suppress(KeyboardInterrupt):
                send(number)
                time.sleep(60)
            time.sleep(60)

    assert stopped(number, command) == "Interrupted. Go on."


def test_handlers_of_somebody_else_are_left_alone() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with stoppable(lambda: "Go on."):
            send(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


def test_a_signal_whose_exception_is_lost_ends_the_server_s_thread_without_a_word() -> None:
    ended: list[bool] = []

    def server(grid: Heeding) -> None:
        with contextlib.suppress(SystemExit):  # as Python does with one that ends a thread
            while True:
                list(grid.pull_messages([]))

    def command() -> None:
        with stoppable(lambda: "Go on."):
            thread = threading.Thread(target=server, args=(Heeding(LocalGrid({})),))
            thread.start()
            with contextlib.suppress(KeyboardInterrupt):  # somebody's callback
                send(signal.SIGTERM)
            thread.join()
            ended.append(True)
            raise RunError("the simulation ended before its server did.")

    assert stopped(signal.SIGTERM, command) == "Interrupted. Go on."
    assert ended


@by_signal
def test_a_run_stopped_before_its_rounds_leaves_no_folder_and_names_none_to_resume(
    number: int, experiment: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_engine, "run_on_ray", lambda *args: send(number))
    settled = experiment()
    said = stopped(number, lambda: ray_engine.simulate(settled, Silent()))
    assert said == "Interrupted. No round had begun and nothing is left of it: start it again."
    assert not Path(settled.run.out).exists()


@by_signal
def test_a_run_stopped_in_its_rounds_names_the_folder_to_resume(
    number: int, experiment: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    settled = experiment()
    out = Path(settled.run.out)

    def rounds(*args: object) -> None:
        (out / "config.toml").touch()
        send(number)

    monkeypatch.setattr(ray_engine, "run_on_ray", rounds)
    said = stopped(number, lambda: ray_engine.simulate(settled, Silent()))
    assert said.endswith(f"fedpet simulate --resume {out}")


def test_a_run_stopped_behind_its_result_is_not_said_to_be_resumable(
    experiment: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    settled = experiment()
    out = Path(settled.run.out)

    def rounds(*args: object) -> None:
        for name in ("config.toml", "result.json"):
            (out / name).touch()
        send(signal.SIGTERM)

    monkeypatch.setattr(ray_engine, "run_on_ray", rounds)
    said = stopped(signal.SIGTERM, lambda: ray_engine.simulate(settled, Silent()))
    assert said == f"Interrupted. The run was over by then, and lies in {out}."


def test_a_run_stopped_while_its_rows_are_read_says_to_start_again(
    experiment: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_engine, "prepare", lambda *args: send(signal.SIGTERM))
    said = stopped(signal.SIGTERM, lambda: ray_engine.simulate(experiment(), Silent()))
    assert "start it again" in said


@by_signal
def test_a_federated_search_that_is_stopped_goes_on_by_the_same_command(
    number: int,
    experiment: Callable[..., Experiment],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_engine, "run_on_ray", lambda *args: send(number))
    settled, out = experiment(**SEARCH), tmp_path / "found.json"
    said = stopped(number, lambda: ray_engine.search(settled, out, Silent()))
    assert "The same command goes on" in said
    assert not list(tmp_path.glob("found*"))


@by_signal
def test_a_central_search_that_is_stopped_says_so_once(number: int) -> None:
    def command() -> None:
        with SearchBar():
            send(number)

    assert stopped(number, command) == "Interrupted. No step was taken: start it again."


@pytest.mark.parametrize("when", ["while it starts", "once it runs"])
def test_sigterm_is_ours_though_ray_puts_a_handler_of_its_own(
    when: str, experiment: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")

    def init(**options: object) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        if when == "while it starts":
            send(signal.SIGTERM)

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "cluster_resources", lambda: send(signal.SIGTERM))
    settled = experiment()
    stopped(signal.SIGTERM, lambda: ray_engine.simulate(settled, Silent()))
    assert not Path(settled.run.out).exists()
