"""Whatever goes wrong on the command line is one sentence, and an exit code that says whose."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import in_process_run
import pytest
import tiny
import tomli_w
from rich.console import Console
from tiny import Silent

import fedpet
from fedpet.cli import main
from fedpet.cli.faults import report_fault
from fedpet.config import Experiment
from fedpet.errors import ConfigError
from fedpet.run import ray_engine
from fedpet.run.progress import LiveLine

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return command


@pytest.fixture(scope="module")
def run_folder(files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose folder's name looks like markup."""
    folder = tmp_path_factory.mktemp("runs") / "sweep [lr=0.1] [bold]"
    in_process_run.run(tiny.make_experiment(*files, folder, strategy_num_rounds=1))
    return folder


def process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        [sys.executable, "-m", "fedpet.cli", *arguments],
        env=environment,
        text=True,
        stderr=subprocess.PIPE,
        check=False,
        **options,
    )


def raises(error: BaseException) -> Callable[..., Any]:
    def run(*_: object, **__: object) -> None:
        raise error

    return run


# What nobody foresaw


def test_an_unforeseen_error_is_a_sentence_a_log_and_exit_code_70(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("fedpet.report.results.read_results", raises(TypeError("a\nb")))
    for _ in range(2):
        code, said, _ = command("compare", "x")
        assert code == 70
        assert said.startswith(
            "Error: something failed that fedpet does not foresee: TypeError: a b"
        )
        assert len(said.splitlines()) == 1
    logs = list(tmp_path.glob("fedpet-error-*.log"))
    assert len(logs) == 2, "none is written over"
    assert "Traceback (most recent call last)" in logs[0].read_text()
    assert "fedpet compare x" in logs[0].read_text()


def test_an_import_that_fails_inside_a_command_is_no_traceback(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fedpet.report.compare", None)
    code, said, _ = command("compare", "x")
    assert (code, len(said.splitlines())) == (70, 1)
    assert "ModuleNotFoundError" in said


def test_the_log_of_a_run_that_fails_lies_in_its_folder(
    experiment: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = experiment()
    folder = Path(settings.run.out)
    folder.mkdir()
    monkeypatch.setattr(ray_engine, "run_on_ray", raises(ZeroDivisionError("none")))
    with pytest.raises(ZeroDivisionError) as failed:
        ray_engine.simulate(settings, Silent())
    said = report_fault(failed.value)
    [log] = folder.glob("fedpet-error-*.log")
    assert repr(str(log)) in said


def test_an_interrupt_outside_a_command_is_one_word_and_130(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "app", raises(KeyboardInterrupt()))
    assert command("compare", "x")[:2] == (130, "Interrupted.\n")


def test_an_output_that_nobody_reads_ends_the_command_quietly(run_folder: Path) -> None:
    for arguments in (("compare", str(run_folder)), ("--help",)):
        reading, writing = os.pipe()
        os.close(reading)
        done = process(*arguments, stdout=writing)
        os.close(writing)
        assert (done.returncode, done.stderr) == (141, ""), arguments


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_an_output_without_room_is_one_sentence(run_folder: Path) -> None:
    with open("/dev/full", "w") as full:
        done = process("compare", str(run_folder), stdout=full)
    assert done.returncode == 1
    assert done.stderr == (
        "Error: the output cannot be written: No space left on device. Make room.\n"
    )


# Paths that cannot be used


@pytest.mark.parametrize(
    "arguments",
    [
        ("mask", "bundled", "--out", "absent/x"),
        ("mask", "bundled", "--out", "."),
        ("estimate", "--json", "absent/x"),
        ("estimate", "--json", "."),
        ("report", "run", "--out", "absent/x"),
        ("report", "run", "--png", "."),
        ("search", "--out", "file/x"),
        ("search", "--out", "."),
        ("search", "--federated", "--out", "file/x"),
        ("deploy", "film-reviews", "--host", "a", "--node", "b", "--out", "file/x"),
        ("simulate", "--out", "file"),
        ("simulate", "--out", "/proc/absent/x"),
        ("simulate", "--out", "~nobody-of-this-name/x"),
        ("mask", "~nobody-of-this-name/x"),
        ("simulate", "--resume", "file"),
        ("simulate", "x" * 300 + ".toml"),
        ("compare", "x" * 300),
        ("compare", "file/x"),
        ("report", "x" * 300),
        ("merge", "x" * 300, "--out", "m"),
    ],
    ids=" ".join,
)
def test_a_path_that_cannot_be_used_is_one_sentence_before_any_work(
    command: Command, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    Path("file").write_text("")
    monkeypatch.setattr("fedpet.data.load_data", raises(AssertionError("work")))
    monkeypatch.setattr("fedpet.estimate.estimate", raises(AssertionError("work")))
    monkeypatch.setattr("fedpet.pet.mask.build_mask", raises(AssertionError("work")))
    code, said, _ = command(*arguments)
    assert code == 2
    assert said.startswith("Error: ")
    assert len(said.splitlines()) == 1
    assert sorted(path.name for path in Path().iterdir()) == ["file"], "nothing is left"


def test_merging_into_a_file_or_where_none_may_be_made_is_refused(
    command: Command, run_folder: Path
) -> None:
    Path("file").write_text("")
    for out in ("file", "file/x", "/proc/absent"):
        code, said, _ = command("merge", str(run_folder), "--out", out)
        assert code == 2
        assert f"the folder {out!r} cannot be made" in said


def test_a_process_without_a_home_folder_is_told_what_to_set() -> None:
    script = (
        "import os, pwd, sys\n"
        "def none(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = none\n"
        "from fedpet.cli.main import main\n"
        "sys.argv = ['fedpet', *sys.argv[1:]]\n"
        "main()\n"
    )

    def homeless(*arguments: str, **given: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | given
        for name in ("HOME", "FLWR_HOME", "HF_HOME", *(() if given else ("FEDPET_CACHE",))):
            environment.pop(name, None)
        return subprocess.run(
            [sys.executable, "-c", script, *arguments],
            env=environment,
            text=True,
            capture_output=True,
            check=False,
        )

    done = homeless("estimate")
    assert done.returncode == 2
    assert "Set HOME, or FEDPET_CACHE, to a folder that can be written." in done.stderr
    assert len(done.stderr.splitlines()) == 1
    imported = homeless("simulate", "--out", "/proc/absent/x", FEDPET_CACHE="/proc/absent")
    assert "'/proc/absent/x' cannot be made" in imported.stderr, "Flower was imported before"


def test_libraries_that_ask_for_a_home_folder_take_the_cache_where_there_is_none(
    tmp_path: Path,
) -> None:
    script = (
        "import pwd, sys\n"
        "def none(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = none\n"
        "from fedpet.cli.main import main\n"
        "sys.argv = ['fedpet', 'compare']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "import flwr.simulation, huggingface_hub.constants\n"
        "print(huggingface_hub.constants.HF_HOME)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment |= {"FEDPET_CACHE": str(tmp_path)}
    for name in ("HOME", "FLWR_HOME", "HF_HOME"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "hub")


# A user's text in what is printed


def test_paths_come_out_as_they_were_given(command: Command, run_folder: Path) -> None:
    long = Path("a" * 100)
    _, _, printed = command("merge", str(run_folder), "--out", str(long / "model [bold]"))
    assert printed == f"Plain model: {long / 'model [bold]'}\n"
    _, _, printed = command("report", str(run_folder))
    assert printed == f"Page: {run_folder / 'report.html'}\n"
    _, _, printed = command("report", str(run_folder), "--out", ":bug: [b].html")
    assert printed == "Page: :bug: [b].html\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("mask", "BACKBONE", "--out", "OUT"), "Positions: OUT"),
        (("estimate", "JOB", "--json", "OUT"), "Numbers: OUT"),
        (
            ("search", "JOB", "--out", "OUT"),
            "Structure: OUT   Train it: --set structure.file='OUT'",
        ),
        (("deploy", "JOB", "--host", "a", "--node", "b", "--out", "OUT"), "Deployment: OUT   What"),
        (("init", "ROWS", "--out", "OUT.toml"), "Experiment: OUT.toml   Read it, then run it: "),
        (("export", "RUN", "--format", "merged", "--out", "OUT"), "Plain model: OUT"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_every_command_names_the_file_it_made_as_it_was_given(
    command: Command,
    files: tuple[Path, Path],
    run_folder: Path,
    arguments: tuple[str, ...],
    said: str,
) -> None:
    backbone, rows = files
    changes = {"structure_preset": "lnfit", "search_budget": 600, "search_max_steps": 1}
    tables = tiny.make_experiment(*files, Path("unused"), **changes).to_tables()
    Path("job.toml").write_text(tomli_w.dumps(tables), encoding="utf-8")
    out = "[bold] " + "x" * 100 + " [lr=0.1] :bug:"
    names = {"BACKBONE": str(backbone), "ROWS": str(rows), "RUN": str(run_folder)}
    names |= {"JOB": "job.toml", "OUT": out, "OUT.toml": f"{out}.toml"}
    code, failed, printed = command(*(names.get(one, one) for one in arguments))
    assert code == 0, failed
    assert said.replace("OUT", out) in printed


def test_the_run_s_end_names_its_folder_whole(
    command: Command, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = json.loads((run_folder / "result.json").read_text())
    result["run"]["backbone"] = "/" + "/".join(["folder"] * 20) + "/[red]bert[/]"
    place = Path("runs/sweep [lr=0.1] [/]", "x" * 80)
    run = SimpleNamespace(result=result, folder=place)
    monkeypatch.setattr(fedpet, "simulate", lambda *_, **__: run)
    _, _, printed = command("simulate")
    assert f"Run folder: {place}   Plain model: {place / 'model'}" in printed.splitlines()
    assert f"tiny: fedpet, {result['run']['backbone']}, seed 0" in printed.splitlines()[0]


def test_a_live_line_shows_markup_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Console(force_terminal=True, record=True, width=120, file=open(os.devnull, "w"))  # noqa: SIM115
    monkeypatch.setattr("fedpet.run.progress.Console", lambda **_: shown)
    with LiveLine() as line:
        line.on_stage("loading the backbone 'a[b]c[/d]'")
        line._show("resuming x[b]", 1, 2, "state [/]")
        line._bar.refresh()
    shown.file.close()
    text = shown.export_text()
    assert "resuming x[b]" in text
    assert "state [/]" in text


# Values of text


@pytest.mark.parametrize(
    "text", ["2024", "01", "true", "1e5", "2024-01-02", "1.50", "[1]", "{a = 1}", "a # b", "0x1f"]
)
def test_a_key_of_text_takes_what_was_written(tmp_path: Path, text: str) -> None:
    file = tmp_path / "e.toml"
    file.write_text("")
    for key in ("run.name", "data.source", "data.label-column"):
        settings = Experiment.from_file(file, [f"{key}={text}"])
        stage, _, name = key.partition(".")
        assert settings.to_tables()[stage][name] == text


def test_a_key_of_texts_takes_what_was_written(tmp_path: Path) -> None:
    file = tmp_path / "e.toml"
    file.write_text("")

    def names(text: str) -> tuple[str, ...]:
        return Experiment.from_file(file, [f"data.label-names={text}"]).data.label_names

    assert names("['a, b', 'c']") == ("a, b", "c")
    assert names("[1, 2]") == ("1", "2")
    assert names("[01,neg]") == ("01", "neg")
    assert names("true") == ("true",)
    assert names("no,yes") == ("no", "yes")


def test_a_key_of_numbers_stays_strict(tmp_path: Path) -> None:
    file = tmp_path / "e.toml"
    file.write_text("")
    for override in ("strategy.num-rounds='4'", "mask.density=true", "run.seed=1.5", "run.seed=01"):
        with pytest.raises(ConfigError, match="must be of type"):
            Experiment.from_file(file, [override])
    assert Experiment.from_file(file, ["search.budget=2000"]).search.budget == 2000
    assert Experiment.from_file(file, ["search.budget=8kB"]).search.budget == "8kB"


def test_a_number_for_text_in_a_file_is_refused_with_the_quotes_it_needs(tmp_path: Path) -> None:
    file = tmp_path / "e.toml"
    file.write_text("[run]\nname = 2024\n")
    with pytest.raises(ConfigError, match='got 2024: put it in quotes, "2024"'):
        Experiment.from_file(file)


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path, run_folder: Path) -> None:
    from fedpet.pet.structure import load_structure
    from fedpet.report.loading import read_report

    file = tmp_path / "e.toml"
    file.write_text("[run]\nname = 'x'\n", encoding="utf-8-sig")
    assert Experiment.from_file(file).run.name == "x"
    for name in ("config.toml", "structure.json"):
        text = (run_folder / name).read_text(encoding="utf-8")
        (run_folder / name).write_text(text, encoding="utf-8-sig")
    assert read_report(run_folder).config["run"]["name"] == "tiny"
    tables = {"structure": {"file": str(run_folder / "structure.json")}}
    assert load_structure(Experiment.from_tables(tables).structure, []).modules
