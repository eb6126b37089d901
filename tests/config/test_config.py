"""An experiment: one list of keys, the same by file, by --set and by Flower's run config."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpet.config import Experiment, TrainingConfig
from fedpet.errors import ConfigError


def test_an_experiment_survives_each_of_its_forms() -> None:
    tables = {
        "data": {"text-columns": ["a", "b"], "label-names": ["no", "yes"]},
        "mask": {"density": 0.02, "enabled": False},
        "training": {"learning-rates": ["mask=0.1"]},
    }
    experiment = Experiment.from_tables(tables)
    assert experiment.data.text_columns == ("a", "b")
    assert Experiment.from_tables(experiment.to_tables()) == experiment
    assert Experiment.from_run_config(experiment.to_run_config()) == experiment


def test_the_run_config_is_flat_and_scalar() -> None:
    for key, value in Experiment().to_run_config().items():
        assert "_" not in key
        assert isinstance(value, str | int | float | bool)


def test_an_override_wins_over_the_file_and_the_last_over_the_first(tmp_path: Path) -> None:
    file = tmp_path / "some.toml"
    file.write_text("[mask]\ndensity = 0.1\n[strategy]\nnum_rounds = 3\n")
    experiment = Experiment.from_file(
        file, ["mask.density=0.2", "mask.density=0.3", "backbone.model=my-folder"]
    )
    assert experiment.mask.density == 0.3
    assert experiment.strategy.num_rounds == 3
    assert experiment.backbone.model == "my-folder"


def test_every_built_in_experiment_reads(repository: Path) -> None:
    for file in (repository / "simulations" / "experiments").glob("*.toml"):
        assert Experiment.from_file(file).run.name == file.stem


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("density=0.1", "stage.key=value"),
        ("mask.density", "stage.key=value"),
        ("mask.density=true", "type float"),
        ("data.metric=pearson", "regression"),
        ("data.text-columns=[]", "two for pairs"),
        ("clients.dirichlet-alpha=0", "above 0"),
        ("strategy.quorum=1.5", "fraction"),
        ("strategy.name=fedsgd", "fedavg"),
        ("training.learning-rate=-1", "above 0"),
        ("training.learning-rates=['head']", "head=0.01"),
    ],
)
def test_a_bad_override_is_refused_with_the_rule(tmp_path: Path, override: str, word: str) -> None:
    file = tmp_path / "empty.toml"
    file.write_text("")
    with pytest.raises(ConfigError) as error:
        Experiment.from_file(file, [override])
    assert word in str(error.value)


@given(st.floats(1e-9, 1e3), st.sampled_from(["mask", "lora", "head"]))
def test_a_kind_s_own_rate_wins_and_the_others_keep_theirs(rate: float, kind: str) -> None:
    config = TrainingConfig(learning_rate=0.5, learning_rates=(f"{kind}={rate!r}",))
    assert config.rate_of(kind) == rate
    assert config.rate_of("other") == 0.5
