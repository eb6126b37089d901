"""Every number of an experiment has a stated range, and nothing outside it is taken."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, get_type_hints

import numpy as np
import pytest

from fedpet.config import (
    ClientsConfig,
    Experiment,
    MaskConfig,
    SearchConfig,
    StrategyConfig,
    StructureConfig,
    TrainingConfig,
)
from fedpet.config.ranges import Range, Stage, stated_ranges
from fedpet.config.strategy_registry import registered_rules
from fedpet.errors import ConfigError, StructureError
from fedpet.pet.mask import mask_size
from fedpet.pet.structure import ModuleSpec, Structure

STAGES: dict[str, Any] = get_type_hints(Experiment)
# A rule that takes the parameter, for those that only single rules take.
TAKER = {name: rule for rule, its in registered_rules().items() for name in its.parameters()}
CLASSES = [*STAGES.items(), *(("strategy", rule) for rule in registered_rules().values())]
NUMBERS = [
    (table, field, kinds, allowed)
    for table, stage in CLASSES
    for field, (kinds, allowed) in stated_ranges(stage).items()
    if stage is STAGES[table] or field in stage.parameters()
]


def build(table: str, field: str, value: Any) -> Any:
    more = {"name": TAKER[field]} if field in TAKER else {}
    return STAGES[table](**{field: value, **more})


def test_every_number_of_every_stage_states_its_range() -> None:
    assert len(NUMBERS) > 50
    missing = [f"{table}.{field}" for table, field, _, allowed in NUMBERS if allowed is None]
    assert missing == []
    for table, stage in STAGES.items():
        assert issubclass(stage, Stage), table
        told = {f.name for f in dataclasses.fields(stage) if type(f.default) in (int, float)}
        assert told <= set(stated_ranges(stage)), table  # a number under any other type


@pytest.mark.parametrize(("table", "field", "kinds", "allowed"), NUMBERS)
def test_no_number_is_taken_outside_its_range_nor_one_that_is_none(
    table: str, field: str, kinds: tuple[type, ...], allowed: Range
) -> None:
    bad: list[Any] = [math.nan, math.inf, -math.inf, True, None]
    bad += [] if str in kinds else ["1"]
    bad += [0.5] if float not in kinds else []
    if allowed.least > -math.inf:
        bad += [allowed.least - 1, *([allowed.least] if allowed.above else [])]
    if allowed.most < math.inf:
        bad += [allowed.most + 1, *([allowed.most] if allowed.below else [])]
    name = f"{table}.{field.replace('_', '-')} must be "
    for value in bad:
        with pytest.raises(ConfigError) as refusal:
            build(table, field, value)
        assert str(refusal.value).startswith(name)
        assert "got " in str(refusal.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.clip-norm=-1", "at least 0, got -1.0"),
        ("training.weight-decay=-0.1", "at least 0"),
        ("training.learning-rate=inf", "above 0 and finite, got inf"),
        ("structure.scale=nan", "above 0 and finite, got nan"),
        ("structure.scale=0", "above 0"),
        ("strategy.round-deadline-seconds=nan", "above 0 and finite"),
        ("strategy.node-wait-seconds=-1", "at least 0"),
        ("clients.seed=-1", "at least 0"),
        ("data.max-train-rows=-1", "at least 0"),
        ("clients.dirichlet-alpha=inf", "above 0 and finite"),
        ("search.budget=nan", "fraction of the backbone"),
        ("training.proximal-mu=inf", "at least 0 and finite"),
        ("mask.density=nan", r"in (0, 1], got nan. It is a fraction"),
        (f"training.learning-rate={10**400}", "above 0 and finite"),
    ],
)
def test_a_number_that_would_do_harm_is_refused_on_the_command_line(
    tmp_path: Any, override: str, words: str
) -> None:
    file = tmp_path / "empty.toml"
    file.write_text("")
    with pytest.raises(ConfigError) as refusal:
        Experiment.from_file(file, [override])
    assert words in str(refusal.value)
    assert override.partition("=")[0] in str(refusal.value)


def test_the_limits_of_a_range_are_themselves_what_they_say() -> None:
    assert TrainingConfig(clip_norm=0, weight_decay=0, local_epochs=0).clip_norm == 0
    assert StrategyConfig(quorum=1, node_wait_seconds=0).quorum == 1
    assert MaskConfig(density=1).density == 1
    assert SearchConfig(beta_end=0).beta_end == 0
    with pytest.raises(ConfigError, match=r"beta-end must be 0, or at least 0\.001, got"):
        SearchConfig(beta_end=1e-4)
    seeds = [-1, 2**63, 2**64]  # they are hashed
    assert [MaskConfig(seed=seed).seed for seed in seeds] == seeds


def test_numpy_s_numbers_become_python_s_in_every_stage() -> None:
    mask = MaskConfig(density=np.float64(0.5), seed=np.int64(3))  # type: ignore[arg-type]
    training = TrainingConfig(learning_rate=np.float32(0.5), threads=np.int32(2))  # type: ignore[arg-type]
    population = ClientsConfig(dirichlet_alpha=np.float64(0.3), num_clients=np.int64(7))  # type: ignore[arg-type]
    search = SearchConfig(budget=np.int64(2000))  # type: ignore[arg-type]
    for config in (mask, training, population, search, StructureConfig(scale=np.float64(2.0))):
        json.dumps(dataclasses.asdict(config))  # numpy's integers would not
        for field in stated_ranges(type(config)):
            assert type(getattr(config, field)) in (int, float)
    assert mask == MaskConfig(density=0.5, seed=3)


@pytest.mark.parametrize("density", [0.5, np.float64(0.5), np.float32(0.5), 1])
def test_a_density_of_any_kind_of_number_chooses_entries(density: float) -> None:
    assert mask_size(density, 10) == int(10 * float(density))


@pytest.mark.parametrize("scale", [math.nan, math.inf, 0.0, -1.0])
def test_a_structure_s_file_with_a_scale_that_cannot_be_is_refused(scale: float) -> None:
    text = Structure((ModuleSpec("lora", "a.query", 4, 2.0),)).to_json()
    table = json.loads(text)
    table["modules"][0]["scale"] = scale
    with pytest.raises(StructureError, match="scale"):
        Structure.from_json(json.dumps(table))


def test_a_structure_s_file_with_a_gate_that_is_no_number_is_refused() -> None:
    table = json.loads(Structure((ModuleSpec("lnfit", "a.norm"),)).to_json())
    with pytest.raises(StructureError, match="all finite"):
        Structure.from_json(json.dumps({**table, "gates": [math.nan]}))
