"""Former names of experiment keys: refused in experiments, read in the folders of runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from report_runs import make_result

from fedpet.config import Experiment
from fedpet.config.renamed import KEYS, VALUES, with_new_names
from fedpet.errors import ConfigError
from fedpet.report.loading import read_report
from fedpet.report.results import read_results


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    make_result(tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("key", [*KEYS, "population.num-clients"])
@pytest.mark.parametrize("snake", [False, True])
def test_a_former_key_is_refused_with_its_present_name(key: str, snake: bool) -> None:
    table, _, name = key.partition(".")
    name = name.replace("-", "_") if snake else name
    now = KEYS.get(key, "clients.num-clients")
    with pytest.raises(ConfigError, match=rf"another name now: write .*{now}"):
        Experiment.from_tables({table: {name: 1}})


@pytest.mark.parametrize(("before", "now"), VALUES.items())
def test_a_former_value_is_refused_with_its_present_name(
    before: tuple[str, str], now: tuple[str, str]
) -> None:
    table, _, name = before[0].partition(".")
    with pytest.raises(ConfigError, match=f"another name now: write {now[0]} = {now[1]!r}"):
        Experiment.from_tables({table: {name: before[1]}})


def test_a_former_key_is_refused_wherever_a_setting_is_given(tmp_path: Path) -> None:
    file = tmp_path / "experiment.toml"
    file.write_text("[run]\nseed = 1\n")
    with pytest.raises(ConfigError, match=r"write codec\.uplink"):
        Experiment.from_file(file, ["codec.up=eden-3"])
    with pytest.raises(ConfigError, match=r"write codec\.downlink-mode = 'full'"):
        Experiment.from_file(file, ["codec.downlink=values"])
    with pytest.raises(ConfigError, match=r"write \[clients\]"):
        Experiment.from_run_config({"population-min-rows": 3})


def test_every_present_name_is_a_key_and_no_former_one_is() -> None:
    tables = Experiment().to_tables()
    known = {f"{stage}.{key}" for stage, table in tables.items() for key in table}
    assert set(KEYS.values()) | {key for key, _ in VALUES.values()} <= known
    assert not known & set(KEYS)


def test_tables_with_present_names_stay_as_they_are() -> None:
    tables = Experiment().to_tables()
    assert with_new_names(tables) == tables


def _before(tables: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same experiment under the former names."""
    former_keys = {now: before for before, now in KEYS.items()}
    former_values = {now: before for before, now in VALUES.items()}
    found: dict[str, dict[str, Any]] = {}
    for stage, table in tables.items():
        for key, value in table.items():
            dotted = former_keys.get(f"{stage}.{key}", f"{stage}.{key}")
            if isinstance(value, str):
                dotted, value = former_values.get((dotted, value), (dotted, value))
            name, _, of = dotted.partition(".")
            found.setdefault({"clients": "population"}.get(name, name), {})[of] = value
    return found


def test_a_run_of_before_is_read_under_the_present_names(run_folder: Path) -> None:
    config = Experiment().to_tables()
    config["codec"] |= {"uplink": "eden-3", "downlink": "eden-5", "downlink-mode": "full"}
    (run_folder / "config.toml").write_text(tomli_w.dumps(config))
    now = read_results([run_folder])[0]["settings"]
    shown = read_report(run_folder).config
    (run_folder / "config.toml").write_text(tomli_w.dumps(_before(config)))
    assert "population" in (run_folder / "config.toml").read_text()
    assert read_results([run_folder])[0]["settings"] == now
    assert read_report(run_folder).config == shown


def test_a_cell_of_before_is_read_under_the_present_names(run_folder: Path) -> None:
    result = json.loads((run_folder / "result.json").read_text())
    cell = run_folder.parent / "cell.json"
    before = {"population": {"alpha": 0.1}, "codec": {"up": "int8", "downlink": "values"}}
    cell.write_text(json.dumps({"settings": before, "result": result}))
    assert read_results([cell])[0]["settings"] == {
        "clients.dirichlet-alpha": "0.1",
        "codec.downlink-mode": "full",
        "codec.uplink": "int8",
    }
