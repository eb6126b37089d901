"""Automatic learning rates: a rate a kind, derived from the model, the same wherever a run runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import architectures
import in_process_run
import pytest
import tiny
import torch
from report_runs import to_text
from tiny import Silent

import fedpet
from fedpet.config import Experiment, TrainingConfig
from fedpet.errors import ConfigError
from fedpet.pet.model import PetModel
from fedpet.protocol.plan import Plan
from fedpet.report.run_table import run_table
from fedpet.run.federate import Prepared, prepare
from fedpet.training.auto_rates import CHANGE, auto_learning_rates, random_tokens
from fedpet.training.optimizer import rate_factor, round_factor

TEXTS = [name for name in architectures.ARCHITECTURES if name != "vit"]


def make(name: str, structure: str = "lnfit+lora", density: float = 0.05) -> PetModel:
    base = architectures.backbone(name)
    mask = architectures.mask_of(base, density) if density else None
    return PetModel(base, mask, architectures.structure_of(base, structure), seed=3)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("files")
    return tiny.make_backbone(folder / "backbone"), tiny.make_rows(folder / "rows")


def automatic(files: tuple[Path, Path], out: Path, **changes: object) -> Experiment:
    return tiny.make_experiment(*files, out, training_learning_rate="auto", **changes)


# The rule


@pytest.mark.parametrize("name", TEXTS)
def test_every_kind_of_every_architecture_has_a_rate_of_its_own(name: str) -> None:
    model = make(name)
    rates = auto_learning_rates(model)
    assert set(rates) == set(model.parameter_groups())
    assert all(1e-5 < rate < 10 for rate in rates.values())


@pytest.mark.parametrize("structure", ["lnfit", "bitfit", "lora", "hiwi-bias", "lora-factors"])
def test_a_model_stands_to_the_bit_where_it_stood(structure: str) -> None:
    model = make("bert", structure)
    model.set_delta(0.01 * torch.randn(model.num_values), seed=5)
    model.model.train()
    flat = {kind: group.detach().clone() for kind, group in model.parameter_groups().items()}
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    auto_learning_rates(model)
    assert model.model.training
    assert all(torch.equal(flat[kind], group) for kind, group in model.parameter_groups().items())
    after = model.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_twice_the_scale_of_lora_takes_half_the_rate() -> None:
    def rate(scale: int) -> float:
        base = architectures.backbone("bert")
        lora = fedpet.LoraConfig(r=2, lora_alpha=2 * scale, target_modules=["query"])
        return auto_learning_rates(
            fedpet.get_pet_model(base.model, fedpet.PetConfig(modules=[lora]))
        )["lora"]

    assert rate(8) == pytest.approx(rate(4) / 2, rel=0.05)


def test_the_denser_the_mask_the_lower_its_rate() -> None:
    rates = [auto_learning_rates(make("bert", "none", d))["mask"] for d in (0.01, 0.1, 0.5)]
    assert rates[0] > 2 * rates[1] > 4 * rates[2]


def test_a_step_at_its_rate_changes_the_norms_outputs_by_what_the_rule_says() -> None:
    model = make("bert", "lnfit", 0)
    rates, seen = auto_learning_rates(model), {}
    norms = [m for m in model.model.modules() if isinstance(m, torch.nn.LayerNorm)]
    inputs = [torch.randn(6, 32) for _ in norms]
    for step in (0.0, rates["lnfit"]):
        group = model.parameter_groups()["lnfit"].detach()
        group.copy_(step * (torch.randint(2, group.shape) * 2 - 1))
        model.after_step()
        seen[step] = [norm(x).detach() for norm, x in zip(norms, inputs, strict=True)]
    pairs = zip(seen[0.0], seen[rates["lnfit"]], strict=True)
    squares = [float((new - old).square().mean() / old.square().mean()) for old, new in pairs]
    assert (sum(squares) / len(squares)) ** 0.5 == pytest.approx(CHANGE, rel=0.3)


def test_a_model_of_images_draws_its_own_and_takes_a_batch() -> None:
    model = make("vit")
    for batch in (None, {"pixel_values": torch.randn(2, 3, 16, 16)}):
        assert set(auto_learning_rates(model, batch)) == set(model.parameter_groups())


def test_a_model_without_a_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"states no vocabulary: name a rate"):
        random_tokens(torch.nn.Linear(2, 2))


# Settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer": "sgd"}, "a rule for adamw"),
        ({"learning_rate": "fast"}, "above 0 and finite, or 'auto'"),
        ({"learning_rate": "-0.1"}, "above 0 and finite, or 'auto'"),
        ({"learning_rate": "inf"}, "above 0 and finite, or 'auto'"),
        ({"schedule": "step"}, "auto, constant, linear, cosine"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TrainingConfig(**settings)


def test_a_rate_in_quotes_is_the_number() -> None:
    assert TrainingConfig(learning_rate="0.01") == TrainingConfig(learning_rate=0.01)


def test_rates_fall_by_default_where_they_are_automatic_and_stay_where_they_are_named() -> None:
    assert TrainingConfig().schedule_in_force == "linear"
    assert TrainingConfig(learning_rate=0.01).schedule_in_force == "constant"
    assert TrainingConfig(schedule="cosine").schedule_in_force == "cosine"


def test_rates_rise_over_the_rounds_of_a_warm_up_and_then_follow_the_schedule() -> None:
    training = TrainingConfig(learning_rate=0.01, schedule="cosine", warmup_rounds=3)
    factors = [round_factor(training, number, 10) for number in range(1, 11)]
    bare = [rate_factor("cosine", progress / 10) for progress in range(10)]
    assert factors[3:] == bare[3:]
    assert [f / b for f, b in zip(factors[:3], bare[:3], strict=True)] == [0.25, 0.5, 0.75]
    assert sorted(bare, reverse=True) == bare
    assert rate_factor("cosine", 1.0) == 0.0


def test_an_automatic_rate_that_no_run_derived_is_refused_with_what_to_call() -> None:
    with pytest.raises(ConfigError, match="auto_learning_rates"):
        TrainingConfig().rate_of("mask")


# Runs


def test_a_plan_names_the_rate_of_each_kind_and_keeps_one_that_is_named(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    named = automatic(files, tmp_path / "out", training_learning_rates=["head=0.5"])
    prepared = prepare(named, Silent())
    assert isinstance(prepared, Prepared)
    derived = auto_learning_rates(prepared.pet)
    training = Plan.from_bytes(prepared.plan.to_bytes()).training
    for kind in prepared.pet.parameter_groups():
        assert training.rate_of(kind) == (0.5 if kind == "head" else derived[kind])
    assert (training.schedule, prepared.experiment.training.schedule) == ("linear", "auto")


def test_a_run_says_its_rates_and_any_number_of_nodes_gives_the_same_bits(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    results = [
        in_process_run.run(automatic(files, tmp_path / f"out{nodes}"), nodes=nodes)
        for nodes in (1, 3)
    ]
    assert results[0]["final_values_sha256"] == results[1]["final_values_sha256"]
    training = results[0]["training"]
    assert training["automatic_rates"]
    assert set(training["learning_rates"]) == set(results[0]["model"]["values_by_kind"])
    assert json.loads((tmp_path / "out1" / "result.json").read_text())["training"] == training
    kept = Experiment.from_file(tmp_path / "out1" / "config.toml")
    assert (kept.training.learning_rate, kept.training.learning_rates) == ("auto", ())
    shown = " ".join(to_text(run_table(results[0])).split())
    assert f"learning rates mask {training['learning_rates']['mask']:g}" in shown


def test_the_rates_that_were_derived_give_the_same_run_when_they_are_named(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    first = in_process_run.run(automatic(files, tmp_path / "auto"))
    rates = [f"{k}={rate!r}" for k, rate in first["training"]["learning_rates"].items()]
    named = {"training_learning_rates": rates, "training_schedule": "linear"}
    again = in_process_run.run(tiny.make_experiment(*files, tmp_path / "named", **named))
    assert again["final_values_sha256"] == first["final_values_sha256"]


def test_a_plan_with_a_rate_of_all_is_written_as_before(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    prepared = prepare(tiny.make_experiment(*files, tmp_path / "out"), Silent())
    header = prepared.plan._header().decode()
    assert '"learning_rate":0.01,' in header
    assert '"schedule":"constant"' in header
    assert "warmup" not in header


def test_a_federated_search_derives_its_rates_too(files: tuple[Path, Path], tmp_path: Path) -> None:
    search = {"search_federated": True, "search_budget": 600}
    prepared = prepare(automatic(files, tmp_path / "out", **search), Silent())
    assert prepared.plan.search is not None
    for kind in ("mask", "head", "lora", "hiwi-bias"):
        assert prepared.plan.search.rate_of(kind) > 0


def test_qfedavg_wants_one_rate(files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"strategy\.client-learning-rate"):
        in_process_run.run(automatic(files, tmp_path / "out", strategy_name="qfedavg"))
