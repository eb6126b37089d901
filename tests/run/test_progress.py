"""Progress: what a run tells while it goes on, where there is no terminal to redraw a line in."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
from rich.console import Console
from tiny import Silent, make_backbone, make_experiment, make_rows

from fedpet.client.node_config import NodeConfig
from fedpet.protocol.frame import Refusal, RefusalCode, pack_refusal
from fedpet.protocol.ledger import SEARCH, Ledger, RoundRecord
from fedpet.protocol.plan import Plan
from fedpet.protocol.request import read_request
from fedpet.run.callbacks import Callbacks
from fedpet.run.federate import federate, prepare
from fedpet.run.local_grid import LocalGrid
from fedpet.run.progress import Progress
from fedpet.run.run_folder import new_run_folder
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
    assert before == "round 0 of 4: f1 0.5000, 0 B"
    assert second.startswith("round 2 of 4: f1 0.6250, 4.5 kB, ")
    assert second.endswith(" left")
    assert last.startswith("round 4 of 4: f1 0.7500, 15 kB")


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
        [task] = progress._bar.tasks
        assert (task.description, task.completed, task.total) == ("loading the backbone", 0, 4)
    assert "8,192 of 20,000" in terminal.file.getvalue()  # type: ignore[attr-defined]


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
    assert capsys.readouterr().err == "round 1 of 4: f1 0.5000, loss 0.693, 0 B\n"


class Counted(Silent):
    """Notes how far each round was."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int, int]] = []

    def on_reply(self, record: RoundRecord, answered: int) -> None:
        self.seen.append((record.kind, record.round, answered, record.clients))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("progress")
    return make_backbone(folder / "b"), make_rows(folder / "r")


@pytest.mark.parametrize("nodes", [1, 3])
def test_clients_are_counted_as_their_nodes_reply_in_every_round(
    files: tuple[Path, Path], tmp_path: Path, nodes: int
) -> None:
    experiment = make_experiment(
        *files,
        tmp_path / "run",
        strategy_num_rounds=2,
        strategy_clients_per_round=6,
        search_federated=True,
        search_rounds=1,
        search_budget=600,
        search_local_steps=1,
    )
    counted = Counted()
    grid = LocalGrid.of(NodeConfig.from_experiment(experiment), nodes)
    federate(grid, prepare(experiment, Silent()), new_run_folder(experiment), Callbacks([counted]))
    rounds = [(SEARCH, 1), ("training", 1), ("training", 2)]
    assert [entry[:2] for entry in counted.seen] == [
        entry for entry in rounds for _ in range(nodes)
    ]
    for entry in rounds:
        answers = [seen[2:] for seen in counted.seen if seen[:2] == entry]
        assert answers == [(6 * (number + 1) // nodes, 6) for number in range(nodes)]


def test_a_client_that_is_asked_again_is_counted_once(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    experiment = make_experiment(*files, tmp_path / "run", strategy_num_rounds=1)
    grid = LocalGrid.of(NodeConfig.from_experiment(experiment), 1)
    honest, calls = grid._handlers[1], []

    def forgetful(payload: bytes) -> bytes:
        calls.append(payload)
        if len(calls) > 1:
            return honest(payload)
        request = read_request(payload)
        digest = Plan.digest(request.plan)
        return b"".join(
            pack_refusal(Refusal(digest, 1, client, "no plan", RefusalCode.PLAN_MISSING))
            for client in request.clients
        )

    grid._handlers[1], counted = forgetful, Counted()
    federate(grid, prepare(experiment, Silent()), new_run_folder(experiment), counted)
    assert [answered for *_, answered, _ in counted.seen] == [4, 4]
    assert len(calls) == 2


def test_a_long_round_says_how_far_it_is_in_a_line_a_minute(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1_000_000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with Progress(20, "f1", search_rounds=2) as progress:
        for answered in range(1, 101):
            clock[0] += 2.0
            progress.on_reply(RoundRecord(3, clients=100), answered)
        clock[0] += 60.0
        progress.on_reply(RoundRecord(1, clients=10, kind=SEARCH), 5)
    assert capsys.readouterr().err.splitlines() == [
        "round 3 of 20 · 30 of 100 clients · 1 min 0 s",
        "round 3 of 20 · 60 of 100 clients · 2 min 0 s",
        "round 3 of 20 · 90 of 100 clients · 3 min 0 s",
        "search round 1 of 2 · 5 of 10 clients · 4 min 20 s",
    ]


@pytest.mark.parametrize("jupyter", [False, True])
def test_a_redrawn_line_counts_clients_and_keeps_the_last_state_in_80_columns(
    jupyter: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = Console(force_terminal=not jupyter, force_jupyter=jupyter, width=80, file=io.StringIO())
    monkeypatch.setattr("fedpet.run.progress.Console", lambda **_: shown)
    monkeypatch.setattr("fedpet.run.progress.find_spec", lambda name: True)
    progress, ledger = Progress(20, "accuracy"), Ledger()
    record = ledger.begin(12)
    record.metric, record.loss = 0.8125, 0.4321
    progress.on_round_end(record, ledger)
    progress.on_reply(RoundRecord(13, clients=100), 37)
    assert progress._bar.tasks[0].completed == 12.37
    plain = Console(width=80, record=True, file=io.StringIO())
    plain.print(progress._bar.get_renderable())
    (line,) = plain.export_text().splitlines()
    assert line.startswith("round 13 of 20 · 37 of 100 clients ")
    assert "0:00:00 accuracy 0.8125, " in line
    assert len(line) <= 80
