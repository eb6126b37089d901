"""A run that was cut short goes on as if nothing had happened: same seed, same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Silent

from fedpet.client.node_config import NodeConfig
from fedpet.config import Experiment
from fedpet.errors import ConfigError, RunError
from fedpet.protocol.ledger import Ledger
from fedpet.run.checkpoint_file import RunCheckpoint, read_journal, write_journal
from fedpet.run.client_journal import Written
from fedpet.run.federate import federate, prepare
from fedpet.run.local_grid import LocalGrid
from fedpet.run.ray_engine import simulate
from fedpet.run.resume import check_journal, read_cut_short
from fedpet.run.run_folder import RunFolder, new_run_folder


@pytest.fixture
def cut_short(files: tuple[Path, Path], tmp_path: Path) -> Callable[..., Experiment]:
    """Makes a run that was stopped in its second round."""

    class StopsInRound2(LocalGrid):
        def pull_messages(self, message_ids: Any) -> Any:
            replies = super().pull_messages(message_ids)
            self.rounds = getattr(self, "rounds", 0) + bool(replies)
            if self.rounds == 2:
                raise KeyboardInterrupt
            return replies

    def make(**changes: Any) -> Experiment:
        experiment = tiny.make_experiment(*files, tmp_path / "cut", **changes)
        grid = StopsInRound2.of(NodeConfig.from_experiment(experiment), 1)
        with pytest.raises(KeyboardInterrupt):
            federate(grid, prepare(experiment, Silent()), new_run_folder(experiment), Silent())
        return experiment

    return make


def resume(run: Path) -> dict[str, Any]:
    prepared = prepare(read_cut_short(run), Silent())
    grid = LocalGrid.of(NodeConfig.from_experiment(prepared.experiment), 1)
    return federate(grid, prepared, RunFolder(run), Silent(), check_journal(run, prepared))


# -- law 6, over a crash ---------------------------------------------------------------------


def killed(folder: Path, *arguments: str, timeout: int = 110) -> dict[str, Any]:
    program = Path(__file__).parents[1] / "helpers" / "crash_harness.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, str(program), str(folder), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    out: dict[str, Any] = json.loads(done.stdout)
    return out


def check(out: dict[str, Any]) -> None:
    assert out["killed"] > 0
    for resumed in out["resumed"]:
        assert resumed == out["expected"]
    assert out["expected"]["rounds"] == [0, 1, 2, 3]
    assert not any(name.startswith("journal") for name in out["expected"]["left"])


@pytest.mark.timeout(600)
def test_a_run_killed_at_any_write_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    check(killed(tmp_path, "fedadam", "steps", "6", "1", timeout=590))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedyogi", "fedmedian"])
def test_a_run_killed_at_20_random_moments_goes_on_to_the_same_bytes(
    tmp_path: Path, strategy: str
) -> None:
    check(killed(tmp_path, strategy, "moments", "20", "2", timeout=3500))
    check(killed(tmp_path / "steps", strategy, "steps", "20", "3", timeout=3500))


def test_a_run_stopped_between_its_last_round_and_its_result_is_finished(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = tiny.make_experiment(*files, tmp_path / "cut", strategy_num_rounds=1)
    grid = LocalGrid.of(NodeConfig.from_experiment(experiment), 1)
    with monkeypatch.context() as patched:

        def stop(*args: object) -> None:
            raise KeyboardInterrupt

        patched.setattr(RunFolder, "write_outputs", stop)
        with pytest.raises(KeyboardInterrupt):
            federate(grid, prepare(experiment, Silent()), new_run_folder(experiment), Silent())
    held = read_journal(tmp_path / "cut")
    assert held is not None
    result = resume(tmp_path / "cut")
    values = np.load(tmp_path / "cut" / "checkpoint" / "values.npy")
    assert values.tobytes() == held.values.tobytes()
    assert result["run"]["resumed"] == 1
    assert result["quality"]["final"] == result["quality"]["by_round"][-1]["value"]


# -- what is not loaded ----------------------------------------------------------------------


def test_a_finished_run_and_an_empty_folder_are_not_resumed(
    cut_short: Callable[..., Experiment], tmp_path: Path
) -> None:
    run = Path(cut_short().run.out)
    resume(run)
    with pytest.raises(ConfigError, match="is finished: there is nothing to resume"):
        read_cut_short(run)
    with pytest.raises(ConfigError, match=r"is no run folder: config\.toml is absent"):
        read_cut_short(tmp_path)


def test_a_journal_under_other_settings_clients_or_of_another_plan_is_never_loaded(
    cut_short: Callable[..., Experiment], tmp_path: Path
) -> None:
    run = Path(cut_short().run.out)
    prepared = prepare(read_cut_short(run), Silent())
    assert check_journal(run, prepared) is not None
    settings = prepared.experiment
    other = replace(settings, strategy=replace(settings.strategy, quorum=0.25))
    with pytest.raises(ConfigError, match=r"other settings: strategy\.quorum was 0\.5, is 0\.25"):
        check_journal(run, replace(prepared, experiment=other))
    elsewhere = replace(settings, run=replace(settings.run, workers=7, cache="elsewhere"))
    check_journal(run, replace(prepared, experiment=elsewhere))
    clients = replace(prepared.data, clients=prepared.data.clients[1:])
    with pytest.raises(ConfigError, match="with other clients: the rows have changed"):
        check_journal(run, replace(prepared, data=clients))
    plan = replace(prepared.plan, fingerprint="0" * 64)
    with pytest.raises(ConfigError, match=r"is of plan [0-9a-f]{16}, and what is settled here"):
        check_journal(run, replace(prepared, plan=plan))


def test_books_that_lost_lines_are_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    ledger = Ledger(path)
    ledger.begin(0)
    length = ledger.close()
    ledger.begin(1)
    ledger.close()
    assert [r.round for r in Ledger.reopen(path, length).rounds] == [0]
    assert path.stat().st_size == length
    with pytest.raises(ConfigError, match="not what the run's journal was written beside"):
        Ledger.reopen(path, length + 1)


# -- the file --------------------------------------------------------------------------------


def make_journal(**changes: Any) -> RunCheckpoint:
    fields: dict[str, Any] = {
        "server_round": 3,
        "plan_digest": "ab" * 16,
        "clients": "cd" * 32,
        "settings": {"run": {"seed": 1}},
        "ledger_bytes": 77,
        "holders": (2**63, 5),
        "clients_file": Written("journal.clients-2", 99, "ef" * 32),
        "elapsed_seconds": 1.5,
        "resumed": 0,
        "values": np.arange(5, dtype=np.float32),
        "optimiser": {"m_t": np.array([0.1, -np.inf, np.nan], dtype=np.float64)},
    }
    return RunCheckpoint(**{**fields, **changes})


def test_a_journal_survives_its_bytes() -> None:
    journal = make_journal()
    read = RunCheckpoint.from_bytes(journal.to_bytes())
    assert read.to_bytes() == journal.to_bytes()
    assert (read.holders, read.clients_file) == (journal.holders, journal.clients_file)
    assert read.values.tobytes() == journal.values.tobytes()
    assert read.optimiser["m_t"].tobytes() == journal.optimiser["m_t"].tobytes()


@settings(max_examples=200)
@given(where=st.integers(0, 10_000), what=st.integers(1, 255), cut=st.booleans())
def test_a_damaged_journal_is_never_read_as_another(where: int, what: int, cut: bool) -> None:
    whole = bytearray(make_journal().to_bytes())
    where %= len(whole)
    if cut:
        damaged = bytes(whole[:where])
    else:
        whole[where] ^= what
        damaged = bytes(whole)
    if 5 <= where < 8 and not cut:
        return  # reserved bytes
    with pytest.raises(ConfigError):
        RunCheckpoint.from_bytes(damaged)


def test_a_journal_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_journal(tmp_path, make_journal(server_round=1))

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"round 2 cannot be written.*--resume"):
        write_journal(tmp_path, make_journal(server_round=2))
    held = read_journal(tmp_path)
    assert held is not None
    assert held.server_round == 1


# -- the command -----------------------------------------------------------------------------


def test_resume_beside_other_settings_is_refused_in_one_sentence(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    for more, word in ((["--set", "run.seed=1"], "--set"), ([], "config.toml is absent")):
        assert word in refused("simulate", "--resume", str(tmp_path), *more)


@pytest.mark.simulation
@pytest.mark.timeout(600)
def test_a_run_on_ray_that_signals_end_twice_says_how_to_resume_and_does(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    """Ctrl-C, and when it goes on SIGTERM with Ctrl-C right after it."""
    import tomli_w

    rounds = 40
    whole = tiny.make_experiment(*files, tmp_path / "whole", strategy_num_rounds=rounds)
    expected, _ = simulate(whole, Silent(), backend="in-process")
    cut, job, ray_folders = tmp_path / "cut", tmp_path / "job.toml", Path(os.environ["RAY_TMPDIR"])
    settings = replace(whole, run=replace(whole.run, workers=1, out=str(cut)))
    job.write_text(tomli_w.dumps(settings.to_tables()), encoding="utf-8")
    before = set(ray_folders.glob("fedpet-*"))
    last = 0
    for arguments, signals, code in (
        ([str(job)], [signal.SIGINT], 130),
        (["--resume", str(cut)], [signal.SIGTERM, signal.SIGINT], 143),
    ):
        process = subprocess.Popen(
            [sys.executable, "-m", "fedpet.cli.main", "simulate", *arguments],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        while process.poll() is None and _round(cut) <= last:
            time.sleep(0.05)
        for number in signals:
            process.send_signal(number)
        _, said = process.communicate(timeout=200)
        assert process.returncode == code, said
        *stages, sentence = said.splitlines()
        assert sentence == f"Interrupted. Go on with it: fedpet simulate --resume {cut}"
        assert not any("Traceback" in line or "Interrupted" in line for line in stages), stages
        assert set(ray_folders.glob("fedpet-*")) == before
        assert last < _round(cut) < rounds
        last = _round(cut)
    assert resume(cut)["final_values_sha256"] == expected["final_values_sha256"]


def _round(run: Path) -> int:
    """The round that a run can go on from."""
    journal = read_journal(run) if run.exists() else None
    return 0 if journal is None else journal.server_round
