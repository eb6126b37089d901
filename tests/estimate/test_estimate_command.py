"""`fedpet estimate`: its table, its file, and bad input refused in one sentence."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

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


def write_toml(experiment: Experiment, path: Path) -> Path:
    import tomli_w

    path.write_text(tomli_w.dumps(experiment.to_tables()), encoding="utf-8")
    return path


def test_the_command_prints_plain_text_and_writes_the_same_numbers(
    experiment: Any, command: Any, tmp_path: Path
) -> None:
    settings = experiment()
    file = write_toml(settings, tmp_path / "tiny.toml")
    _, _, said = command("estimate", str(file), "--link", "nb-iot", "--json", "numbers.json")
    assert "NB-IoT" in said
    assert "LoRaWAN" not in said
    assert "\x1b" not in said
    table = json.loads((tmp_path / "numbers.json").read_text())
    expected = estimate(settings, links=find_links(["nb-iot"])).to_json()
    assert table == json.loads(json.dumps(expected))
    assert table["schema"] == 1


def test_the_command_takes_a_configuration_and_a_number_of_clients(
    command: Any, config_only: Path, tmp_path: Path
) -> None:
    """Neither weights nor data are there, and none are asked for."""
    arguments = ["--model", str(config_only), "--clients", "1000", "--rows", "16"]
    arguments += ["--set", "data.source='./absent'", "--json", "numbers.json"]
    _, _, said = command("estimate", *arguments)
    assert "among 1,000" in " ".join(said.split())
    assert json.loads((tmp_path / "numbers.json").read_text())["run"]["clients"] == 1000


@pytest.fixture
def refused(refused: Callable[..., str]) -> Callable[..., str]:
    return partial(refused, "estimate")


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["nobody/nothing"], "'nobody/nothing' is no folder here, and the hub could not give it"),
        (["./absent.json"], "there is no folder or file './absent.json'"),
    ],
)
def test_a_backbone_out_of_reach_is_refused_by_its_name(
    refused: Any, arguments: list[str], wanted: str
) -> None:
    assert wanted in refused("--clients", "10", "--model", *arguments)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (
            ["--set", "data.source='./absent.csv'"],
            r"the clients cannot be counted.*absent\.csv.*--clients",
        ),
        (["--clients", "9", "--set", "codec.uplink='morse'"], "unknown codec 'morse'.*float32"),
        (["--clients", "9", "--set", "codec.downlink='morse'"], "unknown codec 'morse'.*float32"),
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
    refused: Any, config_only: Path, arguments: list[str], wanted: str
) -> None:
    assert re.search(wanted, refused("--model", str(config_only), *arguments))


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
