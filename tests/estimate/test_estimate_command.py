"""`fedpet estimate`: its table, its file, and bad input refused in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedpet.cli import main
from fedpet.config import Experiment
from fedpet.estimate import Estimate, estimate, find_links
from fedpet.report.estimate_table import estimate_table


def as_text(told: Estimate, width: int = 80) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(estimate_table(told))
    return console.export_text()


def test_the_table_tells_values_bytes_links_sources_and_assumptions(experiment: Any) -> None:
    told = estimate(experiment())
    text = as_text(told)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    for wanted in (
        f"{told.model['communicated_values']:,}",
        "BertForSequenceClassification",
        "dense FedAvg would send",
        "LoRA, rank 8 would send",
        "LoRaWAN",
        "Wi-Fi",
        "ETSI EN 300 220-2",
        "3GPP TS 36.213",
        "no promises",
        "made-up updates",
    ):
        assert wanted in text, wanted


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["fedpet", "estimate", *arguments])
    main.main()


def write_toml(experiment: Experiment, path: Path) -> Path:
    import tomli_w

    path.write_text(tomli_w.dumps(experiment.to_tables()), encoding="utf-8")
    return path


def test_the_command_prints_plain_text_and_writes_the_same_numbers(
    experiment: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    settings = experiment()
    file = write_toml(settings, tmp_path / "tiny.toml")
    written = tmp_path / "numbers.json"
    command(monkeypatch, str(file), "--link", "nb-iot", "--json", str(written))
    said = capsys.readouterr().out
    assert "NB-IoT" in said
    assert "LoRaWAN" not in said
    assert "\x1b" not in said
    table = json.loads(written.read_text())
    expected = estimate(settings, links=find_links(["nb-iot"])).to_json()
    assert table == json.loads(json.dumps(expected))
    assert table["schema"] == 1


def test_the_command_takes_a_configuration_and_a_number_of_clients(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    config_only: Path,
    tmp_path: Path,
) -> None:
    """Neither weights nor data are there, and none are asked for."""
    written = tmp_path / "numbers.json"
    arguments = ["--model", str(config_only), "--clients", "1000", "--rows", "16"]
    arguments += ["--set", "data.source='./absent'", "--json", str(written)]
    command(monkeypatch, *arguments)
    assert "among 1,000" in " ".join(capsys.readouterr().out.split())
    assert json.loads(written.read_text())["run"]["clients"] == 1000


@pytest.fixture
def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run the command, which must end with exit code 2 and one message; give the message."""

    def refuse(*arguments: str) -> str:
        with pytest.raises(SystemExit) as exit_info:
            command(monkeypatch, *arguments)
        assert exit_info.value.code == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        [line] = said.splitlines()
        assert line.startswith("Error: ")
        return line

    return refuse


def test_a_hub_out_of_reach_is_refused_with_what_to_do(refused: Any) -> None:
    said = refused("--model", "nobody/nothing", "--clients", "10")
    assert "'nobody/nothing' is no folder here, and the hub could not give it" in said


def test_an_absent_configuration_is_refused_by_its_name(refused: Any) -> None:
    said = refused("--model", "./absent.json", "--clients", "10")
    assert "there is no folder or file './absent.json'" in said


def test_data_that_cannot_be_read_are_refused_with_the_way_without_them(
    refused: Any, config_only: Path
) -> None:
    said = refused("--model", str(config_only), "--set", "data.source='./absent.csv'")
    assert "the clients cannot be counted" in said
    assert "absent.csv" in said
    assert "--clients" in said


@pytest.mark.parametrize("name", ["uplink", "downlink"])
def test_an_unknown_codec_is_refused(refused: Any, config_only: Path, name: str) -> None:
    said = refused("--model", str(config_only), "--clients", "9", "--set", f"codec.{name}='morse'")
    assert "unknown codec 'morse'" in said
    assert "float32" in said


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--clients", "0"], "--clients and --rows must be at least 1, got 0 and None"),
        (["--clients", "5", "--rows", "0"], "must be at least 1, got 5 and 0"),
        (["--rows", "5"], "--rows is for an estimate without the data"),
        (["--clients", "5", "--link", "pigeon"], "there is no link 'pigeon'"),
        (["--clients", "5", "--set", "structure.preset='magic'"], "lnfit"),
        (["--clients", "5", "--set", "structure.file='absent.json'"], "'absent.json' does not"),
        (["--clients", "5", "--set", "mask.density=1e-9"], "leaves nothing to train"),
        (["--clients", "5", "--set", "data.label-names=['one']"], "two or more different names"),
        (["--clients", "5", "--json", "absent/numbers.json"], "cannot be written"),
    ],
)
def test_bad_input_is_one_sentence(
    refused: Any,
    config_only: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    wanted: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert wanted in refused("--model", str(config_only), *arguments)


def test_an_estimate_with_a_number_of_clients_loads_no_data_library_and_no_ray() -> None:
    """Imports are most of its time."""
    code = (
        "import sys\n"
        "from fedpet.config import Experiment\n"
        "from fedpet.config.builtin import experiment_file\n"
        "from fedpet.estimate import estimate\n"
        "estimate(Experiment.from_file(experiment_file('film-reviews')), num_clients=10)\n"
        "print({'ray', 'datasets', 'pandas', 'pyarrow', 'sklearn', 'peft'} & sys.modules.keys())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == "set()", done.stderr
