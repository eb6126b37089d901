"""Progress: what a run tells while it goes on, where there is no terminal to redraw a line in."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from fedpet.protocol.ledger import Ledger
from fedpet.run.progress import Progress
from fedpet.utils.formatting import show_seconds


def test_a_line_is_printed_for_stages_and_evaluated_rounds_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ledger = Ledger()
    with Progress(4, "f1") as progress:
        progress.on_stage("starting the rounds")
        for server_round, metric in enumerate((0.5, None, 0.625, None, 0.75)):
            record = ledger.begin(server_round)
            record.metric = metric
            ledger.add_client_bytes(down=1000 * server_round, up=500 * server_round)
            progress.on_round_end(record, ledger)
    stage, before, second, last = capsys.readouterr().err.splitlines()
    assert stage == "starting the rounds"
    assert before == "round 0/4: f1 0.5000, 0 B"
    assert second.startswith("round 2/4: f1 0.6250, 4.5 kB, ")
    assert second.endswith(" left")
    assert last.startswith("round 4/4: f1 0.7500, 15 kB")


def test_a_resumed_run_tells_the_time_left_from_its_own_rounds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1_000_000.0]  # of a machine that has been up for days
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    ledger = Ledger()
    with Progress(10, "f1") as progress:
        for server_round in (7, 8, 9):
            record = ledger.begin(server_round)
            record.metric = 0.5
            progress.on_round_end(record, ledger)
            clock[0] += 30.0
    first, second, third = capsys.readouterr().err.splitlines()
    assert "left" not in first
    assert second.endswith(f"{show_seconds(60.0)} left")
    assert third.endswith(f"{show_seconds(30.0)} left")


@pytest.mark.parametrize("widgets", [True, False])
def test_a_notebook_has_a_bar_where_it_can_be_redrawn_and_else_lines(
    widgets: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = Console(force_jupyter=True)
    monkeypatch.setattr("fedpet.run.progress.Console", lambda **_: notebook)
    monkeypatch.setattr("fedpet.run.progress.find_spec", lambda name: widgets or None)
    progress = Progress(4, "f1")
    assert progress._bar.disable is not widgets
    progress.on_stage("starting the rounds")
    assert ("starting" in capsys.readouterr().err) is not widgets


def test_rows_fill_a_bar_of_their_own_which_the_next_stage_takes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Console(force_terminal=True, file=io.StringIO(), width=100)
    monkeypatch.setattr("fedpet.run.progress.Console", lambda **_: terminal)
    with Progress(4, "f1") as progress:
        progress.on_stage("reading and tokenising the rows")
        progress.on_rows(8192, 20000)
        progress._bar.refresh()
        progress.on_stage("Classes: 0 = 'a'.")  # a sentence: the stage is the same
        progress.on_stage("loading the backbone")
        progress._bar.refresh()
    shown = terminal.file.getvalue()  # type: ignore[attr-defined]
    assert "8192/20000 rows" in shown
    assert shown.rindex("0/4 rounds") > shown.rindex("rows ")


def test_no_line_is_printed_for_rows(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(4, "f1") as progress:
        progress.on_rows(8192, 20000)
    assert capsys.readouterr().err == ""


def test_a_line_of_a_round_tells_its_loss(capsys: pytest.CaptureFixture[str]) -> None:
    ledger = Ledger()
    with Progress(4, "f1") as progress:
        record = ledger.begin(1)
        record.metric, record.loss = 0.5, 0.6931
        progress.on_round_end(record, ledger)
    assert capsys.readouterr().err == "round 1/4: f1 0.5000, loss 0.693, 0 B\n"
