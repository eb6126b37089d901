"""Two processes in one folder: the second is refused, and a crash leaves nothing locked."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import in_process_run
import pytest
from tiny import Silent

from fedpet.cli import main
from fedpet.client.node_config import NodeConfig
from fedpet.errors import ConfigError
from fedpet.export.saved_run import merge_run
from fedpet.run import central_search, flower_server, ray_engine, resume
from fedpet.run.local_grid import LocalGrid
from fedpet.run.run_folder import locked_run_folder
from fedpet.utils.lock import LOCK_FILE, locked_folder

HOLDER = """
import subprocess, sys
from pathlib import Path
from fedpet.utils.lock import locked
with locked(Path(sys.argv[1]), Path(sys.argv[1]).parent):
    child = subprocess.Popen(["sleep", "60"], close_fds=False, stdout=subprocess.DEVNULL)
    print(child.pid, flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_elsewhere(file: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Another process holds the lock, and has started a child that outlives it."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(file)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        try:
            yield holder, child
        finally:
            holder.kill()
            os.kill(child, signal.SIGKILL)


@pytest.fixture
def cut_short(experiment: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that was stopped before its first round."""
    settings = experiment()
    monkeypatch.setattr(ray_engine, "run_on_ray", stop)
    prepared = ray_engine.prepare(settings, Silent())
    with locked_run_folder(settings) as out:
        out.write_inputs(prepared.experiment, prepared.plan)
    return out.path


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_second_run_in_one_folder_is_refused_before_it_reads_anything(
    experiment: Any, tmp_path: Path
) -> None:
    settings = experiment(data_source=str(tmp_path / "absent"))
    folder = Path(settings.run.out)
    folder.mkdir()
    with held_elsewhere(folder / LOCK_FILE) as (holder, _):
        with pytest.raises(ConfigError, match=f"another process works in .*{holder.pid}"):
            ray_engine.simulate(settings, Silent())
        assert [path.name for path in folder.iterdir()] == [LOCK_FILE]


def test_the_second_command_says_so_in_one_sentence_and_exits_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["fedpet", "simulate", "--out", str(tmp_path)])
    with held_elsewhere(tmp_path / LOCK_FILE), pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("Error: another process works in ")


def test_a_run_that_still_goes_on_is_not_resumed(cut_short: Path) -> None:
    with held_elsewhere(cut_short / LOCK_FILE), pytest.raises(ConfigError, match="another process"):
        ray_engine.resume(cut_short, Silent())
    assert not (cut_short / "rounds.jsonl").exists()


def test_flower_s_server_meets_the_same_lock(experiment: Any) -> None:
    settings = experiment()
    folder = Path(settings.run.out)
    folder.mkdir()

    class Context:
        run_config = settings.to_run_config()

    with held_elsewhere(folder / LOCK_FILE), pytest.raises(ConfigError, match="another process"):
        flower_server.serve_run(None, Context())


def test_flower_s_server_leaves_a_whole_run_and_no_lock(experiment: Any, capsys: Any) -> None:
    settings = experiment(strategy_num_rounds=1)
    folder = Path(settings.run.out)

    class Context:
        run_config = settings.to_run_config()

    flower_server.serve_run(LocalGrid.of(NodeConfig.from_experiment(settings), 1), Context())
    assert (folder / "result.json").exists()
    assert not (folder / LOCK_FILE).exists()
    assert f"run folder: {folder}" in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("search", [central_search.search_centrally, ray_engine.search])
def test_two_searches_for_one_file_do_not_meet(
    experiment: Any, tmp_path: Path, search: Any
) -> None:
    out = tmp_path / "structure.json"
    with (
        held_elsewhere(tmp_path / f".structure.json{LOCK_FILE}"),
        pytest.raises(ConfigError, match=r"another process works in .*structure\.json"),
    ):
        search(experiment(), out, Silent())


def test_two_merges_into_one_folder_do_not_meet(experiment: Any, tmp_path: Path) -> None:
    settings = experiment(strategy_num_rounds=1)
    in_process_run.run(settings)
    out = tmp_path / "model"
    out.mkdir()
    with held_elsewhere(out / LOCK_FILE), pytest.raises(ConfigError, match="another process"):
        merge_run(Path(settings.run.out), out)
    merge_run(Path(settings.run.out), out)
    assert (out / "model.safetensors").exists()
    assert not (out / LOCK_FILE).exists()


def test_a_lock_ends_with_its_process_though_a_child_lives_on(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path / LOCK_FILE) as (holder, child):
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # it is there
        assert (tmp_path / LOCK_FILE).exists(), "what a crash leaves"
        with locked_folder(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_worked_on_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked_folder(tmp_path):
        assert "is not locked (No locks available)" in caplog.text


def test_a_folder_made_for_a_run_that_did_not_start_goes_again(
    experiment: Any, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "deep" / "run"
    settings = experiment(data_label_column="absent", run_out=str(out))
    with pytest.raises(ValueError, match="absent"):
        ray_engine.simulate(settings, Silent())
    assert not (tmp_path / "new").exists()


def test_a_folder_that_was_there_stays_when_its_run_does_not_start(
    experiment: Any, tmp_path: Path
) -> None:
    settings = experiment(data_label_column="absent", run_out=str(tmp_path / "mine"))
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="absent"):
        ray_engine.simulate(settings, Silent())
    assert list((tmp_path / "mine").iterdir()) == []


def test_two_runs_without_a_name_for_their_folder_take_two(
    experiment: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = experiment(run_out="")
    with locked_run_folder(settings) as one, locked_run_folder(settings) as other:
        assert [one.path, other.path] == [Path("runs/tiny-1"), Path("runs/tiny-2")]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_a_run_is_locked_while_its_experiment_is_read(cut_short: Path) -> None:
    with resume.cut_short(cut_short) as settings:
        assert settings.run.out == str(cut_short)
        with (
            pytest.raises(ConfigError, match=f"process {os.getpid()}"),
            resume.cut_short(cut_short),
        ):
            pass
    assert not (cut_short / LOCK_FILE).exists()
