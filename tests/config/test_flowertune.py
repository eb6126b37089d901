"""FlowerTune's settings become an experiment of the same run, and nothing of them is lost."""

from __future__ import annotations

import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedpet.config import DataConfig, Experiment
from fedpet.config.flowertune import read_flowertune
from fedpet.errors import ConfigError

ARGUMENTS = "train.training-arguments"
# As `flwr new` writes it for the leaderboard's general task, but for the numbers.
CONFIG: dict[str, Any] = {
    "model.name": "owner/model-7b",
    "model.quantization": 4,
    "model.gradient-checkpointing": True,
    "model.lora.peft-lora-r": 32,
    "model.lora.peft-lora-alpha": 64,
    "train.save-every-round": 5,
    "train.learning-rate-max": 5e-5,
    "train.learning-rate-min": 1e-6,
    "train.seq-length": 512,
    f"{ARGUMENTS}.output-dir": "",
    f"{ARGUMENTS}.learning-rate": "",
    f"{ARGUMENTS}.per-device-train-batch-size": 16,
    f"{ARGUMENTS}.gradient-accumulation-steps": 2,
    f"{ARGUMENTS}.logging-steps": 10,
    f"{ARGUMENTS}.num-train-epochs": 3,
    f"{ARGUMENTS}.max-steps": 10,
    f"{ARGUMENTS}.save-steps": 1000,
    f"{ARGUMENTS}.save-total-limit": 10,
    f"{ARGUMENTS}.gradient-checkpointing": True,
    f"{ARGUMENTS}.lr-scheduler-type": "constant",
    "strategy.fraction-fit": 0.1,
    "strategy.fraction-evaluate": 0.0,
    "num-server-rounds": 200,
}


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in flat.items():
        *places, name = key.split(".")
        table = found
        for place in places:
            table = table.setdefault(place, {})
        table[name] = value
    return found


def app(
    folder: Path,
    dataset: str = "owner/alpaca-gpt4",
    clients: int | None = 20,
    absent: str = "",
    **changes: Any,
) -> Path:
    config = {**CONFIG, **changes}
    config.pop(absent, None)
    tables: dict[str, Any] = {
        "config": {**nested(config), "static": {"dataset": {"name": dataset}}}
    }
    flwr: dict[str, Any] = {"app": tables}
    if clients:
        flwr["federations"] = {
            "default": "local",
            "local": {"options": {"num-supernodes": clients}},
        }
    file = folder / "pyproject.toml"
    file.write_text(tomli_w.dumps({"project": {"name": "x"}, "tool": {"flwr": flwr}}))
    return file


def test_the_experiment_has_the_model_clients_rounds_and_lora_of_flowertune(
    tmp_path: Path,
) -> None:
    tables = read_flowertune(app(tmp_path)).tables
    assert tables["backbone"] == {"model": "owner/model-7b", "dtype": "bfloat16"}
    assert tables["structure"] == {"preset": "lora-factors", "rank": 32, "scale": 2.0}
    assert tables["mask"] == {"enabled": False}
    assert tables["codec"] == {"uplink": "float32", "downlink": "float32"}
    assert tables["strategy"] == {
        "num-rounds": 200, "clients-per-round": 2, "evaluate-every": 5
    }  # fmt: skip
    assert tables["clients"] == {
        "partition": "iid", "num-clients": 20, "min-rows": 1, "max-rows": 10 * 2 * 16
    }  # fmt: skip
    training = tables["training"]
    assert (training["learning-rate"], training["schedule"]) == (5e-5, "cosine")
    assert (training["batch-size"], training["gradient-checkpointing"]) == (32, True)
    assert tables["run"]["save-every"] == 5
    assert tables["data"]["source"] == "owner/alpaca-gpt4"
    assert tables["data"]["max-length"] == 512


def test_every_key_is_either_used_or_named_as_without_a_counterpart(tmp_path: Path) -> None:
    more = {f"{ARGUMENTS}.neftune-noise-alpha": 5.0, f"{ARGUMENTS}.weight-decay": 0.25}
    found = read_flowertune(app(tmp_path, **more))
    assert found.tables["training"]["weight-decay"] == 0.25
    assert set(found.without) == {
        "model.quantization",
        "train.learning-rate-min",
        "strategy.fraction-evaluate",
        *(
            f"{ARGUMENTS}.{key}"
            for key in (
                *("output-dir", "learning-rate", "logging-steps", "num-train-epochs"),
                *("save-steps", "save-total-limit", "neftune-noise-alpha"),
            )
        ),
    }
    assert found.without[f"{ARGUMENTS}.neftune-noise-alpha"] == "fedpet has no such setting"
    text = found.to_toml("app")
    assert tomllib.loads(text) == found.tables
    assert all(f"#   {key}: " in text for key in found.without)


@pytest.mark.parametrize(
    ("dataset", "columns"),
    [
        ("flwrlabs/alpaca-gpt4", ["instruction"]),
        ("FinGPT/fingpt-sentiment-train", ["instruction", "input"]),
        ("flwrlabs/code-alpaca-20k", ["instruction", "input"]),
        ("medalpaca/medical_meadow_medical_flashcards", ["input"]),
    ],
)
def test_the_prompt_s_columns_are_those_that_flowertune_reads(
    tmp_path: Path, dataset: str, columns: list[str]
) -> None:
    data = read_flowertune(app(tmp_path, dataset)).tables["data"]
    assert data["text-columns"] == columns
    assert data["response-column"] == "output"


def test_epochs_count_where_no_steps_limit_them_and_the_newer_fraction_stands(
    tmp_path: Path,
) -> None:
    file = app(tmp_path, **{f"{ARGUMENTS}.max-steps": -1, "strategy.fraction-train": 0.25})
    found = read_flowertune(file.parent)
    assert found.tables["training"]["local-epochs"] == 3
    assert "max-rows" not in found.tables["clients"]
    assert found.tables["strategy"]["clients-per-round"] == 5
    assert f"{ARGUMENTS}.num-train-epochs" not in found.without


def test_clients_are_those_asked_for_or_told_to_be_guessed(tmp_path: Path) -> None:
    file = app(tmp_path, clients=None)
    assert read_flowertune(file, num_clients=50).tables["clients"]["num-clients"] == 50
    guessed = read_flowertune(file)
    assert guessed.tables["clients"]["num-clients"] == 20
    assert "20 are taken" in guessed.without["options.num-supernodes"]


@pytest.mark.parametrize(
    ("optimizer", "ours"), [("paged_adamw_8bit", "adamw"), ("sgd", "sgd"), ("adafactor", None)]
)
def test_an_optimizer_is_taken_or_named(tmp_path: Path, optimizer: str, ours: str | None) -> None:
    found = read_flowertune(app(tmp_path, **{f"{ARGUMENTS}.optim": optimizer}))
    assert found.tables["training"].get("optimizer") == ours
    assert (f"{ARGUMENTS}.optim" in found.without) == (ours is None)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"num-server-rounds": "many"}, "num-server-rounds .* at least 1, got 'many'"),
        ({"model.lora.peft-lora-r": 0}, "peft-lora-r .* at least 1, got 0"),
        ({"train.learning-rate-max": "fast"}, "learning-rate-max .* number from 0, got 'fast'"),
        ({"model.gradient-checkpointing": 1}, "true or false, got 1"),
        ({"absent": "model.name"}, "no FlowerTune app: .*must have model.name"),
    ],
)
def test_a_value_that_none_can_have_is_refused_with_its_key(
    tmp_path: Path, changes: dict[str, Any], wanted: str
) -> None:
    with pytest.raises(ConfigError, match=wanted):
        read_flowertune(app(tmp_path, **changes))


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        read_flowertune(tmp_path)
    (tmp_path / "pyproject.toml").write_text("[tool.flwr.app.config]\nrounds = 3\n")
    with pytest.raises(ConfigError, match=r"no FlowerTune app: .*has rounds"):
        read_flowertune(tmp_path)
    (tmp_path / "pyproject.toml").write_text("[[[")
    with pytest.raises(ConfigError, match="not a readable TOML"):
        read_flowertune(tmp_path)


def test_the_experiment_reads_as_one(tmp_path: Path) -> None:
    tables = read_flowertune(app(tmp_path)).tables
    known = {field.name.replace("_", "-") for field in fields(DataConfig)}
    if "response-column" not in known:  # without the tasks of language models
        for key in ("task", "response-column", "metric"):
            tables["data"].pop(key)
    experiment = Experiment.from_tables(tables)
    assert experiment.run.save_every == 5
    assert experiment.training.schedule_in_force == "cosine"


# The command


def test_the_command_prints_or_writes_the_experiment_and_names_what_is_left(
    command: Any, tmp_path: Path
) -> None:
    file = app(tmp_path)
    _, _, printed = command("import", "flowertune", str(file))
    code, said, told = command("import", "flowertune", str(file), "--out", "mine.toml")
    assert code == 0
    assert Path("mine.toml").read_text() == printed
    assert "fedpet simulate mine.toml" in told
    assert "no counterpart: model.quantization" in said


def test_the_command_refuses_other_programs_and_places(refused: Any, tmp_path: Path) -> None:
    file = str(app(tmp_path))
    assert "flowertune, got 'nvflare'" in refused("import", "nvflare", file)
    assert "cannot be written" in refused("import", "flowertune", file, "--out", "no/where.toml")
