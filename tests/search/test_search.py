"""A whole search on a random two-layer BERT: budget, resume, what it leaves behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedpet.backbone.pretrained import Backbone, load_backbone
from fedpet.config import BackboneConfig, Experiment
from fedpet.data import FederatedData
from fedpet.errors import ConfigError, DataError, StructureError
from fedpet.pet.model import PetModel
from fedpet.pet.structure import Structure
from fedpet.search import (
    BiLevel,
    SearchConfig,
    SearchProgress,
    SearchResult,
    build_space,
    deviations,
    expected_size,
    faithful,
    run_search,
    solve_zeta,
    split_rows,
)

DEFAULT = Path(__file__).parents[2] / "simulations" / "experiments" / "film-reviews.toml"
CONFIG = SearchConfig(
    budget=700,
    epochs=2,
    batch_size=8,
    learning_rate=0.01,
    evaluate_every=3,
    validation_fraction=0.2,
)


def cross_entropy(model: Any, inputs: Any, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(**inputs).logits, labels)


def load(folder: Path) -> Backbone:
    return load_backbone(BackboneConfig(model=str(folder)), num_outputs=2)


def run(
    folder: Path, data: FederatedData, config: SearchConfig = CONFIG, **options: object
) -> SearchResult:
    indices = np.arange(len(data.train))
    return run_search(load(folder), data.train, indices, data.task, config, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def found(folder: Path, data: FederatedData) -> SearchResult:
    return run(folder, data)


def test_a_searched_structure_keeps_its_budget_in_what_its_model_sends(
    found: SearchResult, folder: Path
) -> None:
    pet = PetModel(load(folder), None, found.structure, seed=0)
    sent = sum(segment.size for segment in pet.segments if segment.kind != "head")
    assert 0 < sent <= CONFIG.budget
    assert sent == found.structure.provenance["values"]


def test_a_searched_structure_comes_back_from_its_file_with_gates_and_provenance(
    found: SearchResult, folder: Path
) -> None:
    again = Structure.from_json(found.structure.to_json())
    assert again == found.structure
    assert again.fingerprint == load(folder).fingerprint
    by_target = {(c["kind"], c["target"]): c["gate"] for c in again.provenance["candidates"]}
    assert len(by_target) == len(found.space.candidates)
    for module, gate in zip(again.modules, again.gates, strict=True):
        assert by_target[module.kind, module.target] == gate


def test_a_search_moves_every_alpha_and_the_backbone_is_the_checkpoint_after_it(
    folder: Path, data: FederatedData
) -> None:
    backbone, plain = load(folder), load(folder)
    seen: list[SearchProgress] = []
    result = run_search(
        backbone, data.train, np.arange(len(data.train)), data.task,
        replace(CONFIG, epochs=1, checkpoint="last"), progress=seen.append,
    )  # fmt: skip
    for (name, a), (_, b) in zip(
        backbone.model.named_parameters(), plain.model.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    assert all(alpha != 0 for alpha in result.alpha)
    assert [p.step for p in seen] == list(range(1, seen[0].total_steps + 1))
    assert seen[-1].score == result.score


def test_the_same_seed_finds_the_same_structure_and_gates(
    found: SearchResult, folder: Path, data: FederatedData
) -> None:
    again = run(folder, data)
    assert again.structure == found.structure
    assert again.probabilities == found.probabilities


def test_a_search_that_was_stopped_goes_on_bit_for_bit(
    found: SearchResult, folder: Path, data: FederatedData, tmp_path: Path
) -> None:
    state = tmp_path / "state.pt"

    def stop(progress: SearchProgress) -> None:
        if progress.step == 4:  # one after the last saved
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(folder, data, state_file=state, progress=stop)
    steps: list[int] = []
    again = run(folder, data, state_file=state, progress=lambda p: steps.append(p.step))
    assert steps[0] == 4
    assert again.probabilities == found.probabilities
    assert again.history == found.history
    with pytest.raises(ConfigError, match="state of a search with other settings"):
        run(folder, data, replace(CONFIG, seed=1), state_file=state)
    labels = 1 - np.asarray(data.train.labels)
    relabelled = replace(data, train=replace(data.train, labels=labels))
    with pytest.raises(ConfigError, match="state of a search with other settings, rows"):
        run(folder, relabelled, state_file=state)
    state.write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="is not the state of a search"):
        run(folder, data, state_file=state)


@pytest.mark.parametrize(
    "changes",
    [
        {"order": "first"},
        {"virtual": "sgd", "hard": True},
        {"virtual": "adamw-exact", "beta_end": 0.2},
        {"space": "s3pet-mix", "dropout": True, "budget": 400},
    ],
)
def test_the_budget_is_met_in_expectation_after_every_step(
    changes: dict[str, object], folder: Path, data: FederatedData
) -> None:
    config = replace(CONFIG, **changes)  # type: ignore[arg-type]
    backbone = load(folder)
    space = build_space(backbone.model, config.space, head=backbone.head)
    pet = PetModel(backbone, None, space.structure(), seed=0)
    search = BiLevel(pet, space, config, total_steps=3, loss=cross_entropy)
    sizes = torch.tensor(space.sizes, dtype=torch.float64)
    betas = []
    for step in range(3):
        rows = np.arange(8) + 8 * step
        search.step(data.train.batch(rows), data.train.batch(rows + 30))
        zeta = solve_zeta(search.alpha, sizes, config.budget, search.beta)
        size = expected_size(search.alpha, sizes, zeta, search.beta)
        assert size == pytest.approx(config.budget, rel=1e-9)
        assert sum(space.sizes[i] for i in search.choice()) >= 0.5 * config.budget
        betas.append(search.beta)
    assert betas[-1] == pytest.approx(config.beta_end or 1.0)
    search.open_gates()


def test_a_step_under_gates_has_the_second_order_that_autograd_has(
    folder: Path, data: FederatedData
) -> None:
    """LoRA's gate has no gradient where B is zero; the unrolled step gives it one."""
    config = replace(CONFIG, space="s3pet-lora", budget=200)
    moved = {}
    for order in ("first", "second"):
        backbone = load(folder)
        space = build_space(backbone.model, config.space, head=backbone.head)
        pet = PetModel(backbone, None, space.structure(), seed=0)
        search = BiLevel(
            pet,
            space,
            replace(config, order=order),
            total_steps=9,
            loss=cross_entropy,
        )
        batches = data.train.batch(np.arange(8)), data.train.batch(np.arange(8) + 30)
        search.step(*batches)
        moved[order] = float(search.alpha.detach().abs().max())
    assert moved["first"] == 0.0
    assert moved["second"] > 0.0


def test_no_row_does_two_things_and_the_halves_are_equal() -> None:
    for n in (3, 10, 101):
        split = split_rows(np.arange(n) * 2, CONFIG)
        parts = [split.theta, split.alpha, split.validation]
        everything = np.concatenate(parts)
        assert len(split.theta) == len(split.alpha) > 0
        assert len(np.unique(everything)) == len(everything) >= n - 1
        assert set(everything) <= set(np.arange(n) * 2)


def test_what_cannot_be_searched_is_refused_in_one_sentence(
    folder: Path, data: FederatedData
) -> None:
    with pytest.raises(StructureError, match="at least the smallest candidate"):
        run(folder, data, replace(CONFIG, budget=1))
    with pytest.raises(StructureError, match="there is nothing to choose"):
        run(folder, data, replace(CONFIG, budget=10**9))
    with pytest.raises(DataError, match="splits its rows in three, and got 2"):
        split_rows(np.arange(2), CONFIG)
    with pytest.raises(ConfigError, match="order must be one of second, first, got 'third'"):
        replace(CONFIG, order="third")
    with pytest.raises(ConfigError, match=r"search\.gate-learning-rate must be above 0"):
        replace(CONFIG, gate_learning_rate=0.0)


def test_a_search_without_a_rate_derives_one_for_each_kind_and_says_so(
    folder: Path, data: FederatedData
) -> None:
    entries = ("head=0.01",)
    found = run(folder, data, replace(CONFIG, learning_rate=0.0, learning_rates=entries))
    settings = found.structure.provenance["settings"]
    rates = dict(entry.split("=") for entry in settings["learning_rates"])
    assert rates.pop("head") == "0.01"
    assert set(rates) == {candidate.spec.kind for candidate in found.space.candidates}
    assert all(float(rate) > 0 for rate in rates.values())


def test_the_faithful_preset_names_no_deviation() -> None:
    assert deviations(faithful(budget=100)) == ()
    assert "first-order gradient of alpha" in deviations(SearchConfig(order="first"))


@pytest.mark.parametrize(
    ("setting", "value", "told"),
    [
        ("learning_rate", 3e-3, "learning rate 0.003 for 0.0003"),
        ("learning_rates", ("head=0.01",), "rates by kind"),
        ("gate_learning_rate", 0.2, "gate learning rate 0.2 for 0.1"),
        ("clip_norm", 0.0, "clip norm 0 for 2"),
        ("beta", 2.0, "beta 2 for 1"),
        ("beta_end", 0.1, "temperature falls"),
        ("rank", 8, "rank 8 for 1"),
        ("scale", 2.0, "scale 2 for 16"),
        ("batch_size", 8, "batches of another size"),
        ("order", "first", "first-order gradient of alpha"),
        ("virtual", "sgd", "unrolled step sgd"),
        ("hard", True, "gates of 0 and 1 in the search"),
        ("dropout", False, "no dropout"),
        ("checkpoint", "last", "last checkpoint"),
        ("space", "mergeable", "space mergeable"),
    ],
)
def test_whatever_leaves_the_paper_is_told(setting: str, value: object, told: str) -> None:
    assert deviations(faithful(budget=100, **{setting: value})) == (told,)


def test_the_command_line_reaches_the_faithful_preset() -> None:
    """The keys that README names."""
    keys = ["search.space=s3pet-mix", "search.learning-rate=3e-4", "search.dropout=true"]
    keys += ["mask.enabled=false", "training.logit-adjustment=0"]
    found = Experiment.from_file(DEFAULT, keys)
    assert found.search == faithful()
    assert not found.mask.enabled
    assert deviations(replace(found.search, budget=100), found.training.logit_adjustment) == ()


def test_adjusted_logits_move_a_search_and_are_told(folder: Path, data: FederatedData) -> None:
    """With rows of one class in three: labels of equal shares would give the same twice."""
    labels = np.asarray(data.train.labels)
    rows = np.concatenate([np.flatnonzero(labels == 0)[:10], np.flatnonzero(labels == 1)[:30]])
    plain = run_search(load(folder), data.train, rows, data.task, CONFIG)
    adjusted = run_search(load(folder), data.train, rows, data.task, CONFIG, logit_adjustment=1.0)
    assert adjusted.alpha != plain.alpha
    told = "logits adjusted by 1 for label shares"
    assert told in adjusted.structure.provenance["deviations"]
    assert told not in plain.structure.provenance["deviations"]
