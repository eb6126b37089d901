"""The mask and the modules as one space: gates on blocks of entries, counts under one budget."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process_run import run as run_whole
from search_runs import SEARCH, lines_of, structure_of
from tiny import Silent, make_backbone, make_experiment, make_rows
from torch import nn

from fedpet.backbone.module_roles import maskable_weights
from fedpet.backbone.pretrained import Backbone, load_backbone
from fedpet.config import BackboneConfig, MaskConfig
from fedpet.data import FederatedData
from fedpet.errors import ConfigError, StructureError
from fedpet.pet.mask import build_mask
from fedpet.pet.model import PetModel
from fedpet.pet.structure import Structure
from fedpet.protocol.plan import Plan
from fedpet.report.gate_tables import gate_map, structure_facts
from fedpet.run.prepare import Prepared, prepare
from fedpet.search import (
    BiLevel,
    SearchConfig,
    SearchResult,
    Space,
    build_space,
    expected_size,
    probabilities,
    random_structure,
    run_search,
    solve_zeta,
    split_rows,
    step_batches,
)
from fedpet.search.space import BlockSpec, model_of_space

CONFIG = SearchConfig(
    space="joint",
    mask_block=24,
    mask_blocks=3,
    budget=900,
    epochs=1,
    max_steps=4,
    batch_size=8,
    learning_rate=0.01,
    learning_rates=("mask=0.05",),
    gate_optimizer="shared",
    competition="values",
    evaluate_every=2,
    validation_fraction=0.2,
)


def load(folder: Path) -> Backbone:
    return load_backbone(BackboneConfig(model=str(folder)), num_outputs=2)


def space_of(backbone: Backbone, **changes: Any) -> Space:
    given: dict[str, Any] = {"mask": MaskConfig(), "block": 24, "blocks": 3, **changes}
    return build_space(backbone.model, "joint", head=backbone.head, **given)


def put_on(backbone: Backbone) -> tuple[PetModel, Space]:
    space = space_of(backbone)
    mask = space.build_mask(maskable_weights(backbone.model, backbone.head))
    return model_of_space(backbone, space, mask, seed=0), space


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(5, 12, (4, 8), generator=generator)}


def moved(pet: PetModel) -> None:
    generator = torch.Generator().manual_seed(1)
    pet.set_delta(0.1 * torch.randn(pet.num_values, generator=generator), seed=0)


def loss_of(pet: PetModel, gates: torch.Tensor | None) -> torch.Tensor:
    pet.set_gates(gates)
    return nn.functional.cross_entropy(pet.model(**batch()).logits, torch.tensor([0, 1, 1, 0]))


def test_gates_of_one_are_the_ungated_model_and_gates_of_zero_the_checkpoint(folder: Path) -> None:
    with torch.no_grad():
        plain = load(folder).model(**batch()).logits
    pet, space = put_on(load(folder))
    moved(pet)
    head = pet.get_delta()
    head[
        [i for s in pet.segments if s.kind != "head" for i in range(s.start, s.start + s.size)]
    ] = 0
    with torch.no_grad():
        ungated = pet.model(**batch()).logits
        pet.set_gates(torch.ones(len(space.candidates)))
        torch.testing.assert_close(pet.model(**batch()).logits, ungated)
        pet.set_gates(torch.zeros(len(space.candidates)))
        shut = pet.model(**batch()).logits
        pet.set_gates(None)
        torch.testing.assert_close(pet.model(**batch()).logits, ungated, rtol=0, atol=0)
        pet.set_delta(head)
        torch.testing.assert_close(pet.model(**batch()).logits, shut)
        pet.set_delta(torch.zeros(pet.num_values))
        torch.testing.assert_close(pet.model(**batch()).logits, plain, rtol=0, atol=0)


def test_a_block_s_gate_and_entries_have_the_gradient_of_the_masked_product(folder: Path) -> None:
    pet, space = put_on(load(folder))
    moved(pet)
    gates = torch.linspace(0.2, 0.9, len(space.candidates), requires_grad=True)
    pet.zero_grad()
    loss_of(pet, gates).backward()
    assert gates.grad is not None
    entries = pet.parameter_groups()["mask"].grad
    assert entries is not None
    entries = entries.clone()

    def slope(at: Callable[[float], float]) -> float:
        return (at(1e-2) - at(-1e-2)) / 2e-2

    def at_gate(index: int, by: float) -> float:
        moved_gates = gates.detach().clone()
        moved_gates[index] += by
        with torch.no_grad():
            return float(loss_of(pet, moved_gates))

    def at_entry(index: int, by: float) -> float:
        values = pet.parameter_groups()["mask"]
        with torch.no_grad():
            values[index] += by
            pet.after_step()
            loss = float(loss_of(pet, gates.detach()))
            values[index] -= by
            pet.after_step()
        return loss

    assert len(entries) == sum(space.blocks)
    for index in (0, 4, len(space.blocks) - 1):
        expected = pytest.approx(slope(partial(at_gate, index)), rel=0.05, abs=2e-4)
        assert float(gates.grad[index]) == expected
    for index in entries.abs().argsort()[-3:].tolist():
        expected = pytest.approx(slope(partial(at_entry, index)), rel=0.05, abs=2e-4)
        assert float(entries[index]) == expected
    # Behind a gate of zero nothing moves.
    shut = gates.detach().clone()
    shut[: len(space.blocks)] = 0
    pet.zero_grad()
    loss_of(pet, shut).backward()
    after = pet.parameter_groups()["mask"].grad
    assert after is not None
    assert not after.any()


def test_values_of_a_gated_mask_are_sent_as_they_are_and_the_checkpoint_comes_back(
    folder: Path,
) -> None:
    backbone = load(folder)
    before = {n: p.detach().clone() for n, p in backbone.model.named_parameters()}
    pet, space = put_on(backbone)
    moved(pet)
    values = pet.get_delta()
    pet.set_gates(torch.full((len(space.candidates),), 0.3))
    torch.testing.assert_close(pet.get_delta(), values, rtol=0, atol=0)
    pet.unload()
    for name, parameter in backbone.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_gates_of_another_number_are_refused_with_theirs(folder: Path) -> None:
    pet, space = put_on(load(folder))
    with pytest.raises(ValueError, match=rf"\({len(space.candidates)},\)"):
        pet.set_gates(torch.ones(len(space.candidates) - len(space.blocks)))


@pytest.fixture(scope="module")
def whole(folder: Path) -> Space:
    return space_of(load(folder))


@given(seed=st.integers(0, 2**32), fraction=st.floats(0.02, 0.98), beta=st.sampled_from([0.1, 1.0]))
@settings(max_examples=40, deadline=None)
def test_the_expected_size_of_mask_and_modules_is_the_budget_and_no_choice_exceeds_it(
    whole: Space, seed: int, fraction: float, beta: float
) -> None:
    alpha = torch.randn(
        len(whole.candidates), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    sizes = torch.tensor(whole.sizes, dtype=torch.float64)
    budget = max(min(whole.sizes), fraction * whole.num_values)
    zeta = solve_zeta(alpha, sizes, budget, beta)
    assert expected_size(alpha, sizes, zeta, beta) == pytest.approx(budget, rel=1e-9)
    chosen = whole.select(probabilities(alpha, sizes, budget, beta).tolist(), budget)
    structure = whole.structure(chosen)
    of_mask = structure.mask.num_values if structure.mask else 0
    assert whole.chosen_size(chosen) <= budget
    assert of_mask == sum(whole.sizes[i] for i in chosen if i < len(whole.blocks))
    assert len(set(chosen)) == len(chosen)


@given(seed=st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_a_weight_s_chosen_blocks_are_its_first_ones_as_many_as_were_chosen(
    whole: Space, seed: int
) -> None:
    scores = np.random.default_rng(seed).random(len(whole.candidates)).tolist()
    order = np.argsort(-np.asarray(scores))
    chosen = whole.select(scores, 0.4 * whole.num_values)
    numbers: dict[str, list[int]] = {}
    for index in chosen:
        spec = whole.candidates[index].spec
        if isinstance(spec, BlockSpec):
            numbers.setdefault(spec.weight, []).append(spec.block)
    assert numbers
    assert all(sorted(blocks) == list(range(len(blocks))) for blocks in numbers.values())
    best = whole.candidates[int(order[0])].spec
    if isinstance(best, BlockSpec):
        assert numbers[best.weight]


def test_blocks_are_prefixes_of_the_ranking_of_their_weight(folder: Path, whole: Space) -> None:
    backbone = load(folder)
    scope = maskable_weights(backbone.model, backbone.head)
    assert Counter(c.spec.weight for c in whole.candidates if isinstance(c.spec, BlockSpec)) == (
        dict.fromkeys(scope, 3)
    )
    mask = build_mask(scope, MaskConfig(), whole.structure([0, 1, 5]).mask)
    first = whole.candidates[0].spec
    assert isinstance(first, BlockSpec)
    weight = scope[first.weight].abs().flatten()
    assert torch.equal(mask.positions[first.weight], weight.sort(stable=True).indices[:48])
    assert sum(len(chosen) for chosen in mask.positions.values()) == 72


def test_what_is_sent_is_what_the_candidates_of_the_whole_space_weigh(folder: Path) -> None:
    pet, space = put_on(load(folder))
    sent = {(s.kind, s.name): s.size for s in pet.segments}
    by_weight: Counter[str] = Counter()
    for candidate in space.candidates:
        if isinstance(candidate.spec, BlockSpec):
            by_weight[candidate.spec.weight] += candidate.size
    assert by_weight == {name: size for (kind, name), size in sent.items() if kind == "mask"}
    assert pet.inexact_kinds == ()
    assert pet.added_parameters == ()


def test_a_random_structure_of_mask_and_modules_keeps_the_budget_in_what_is_sent(
    folder: Path, whole: Space
) -> None:
    backbone = load(folder)
    structure = random_structure(whole, 700, seed=3)
    assert structure.mask is not None
    mask = build_mask(maskable_weights(backbone.model, backbone.head), MaskConfig(), structure.mask)
    pet = PetModel(backbone, mask, structure, seed=0)
    sent = sum(s.size for s in pet.segments if s.kind != "head")
    assert sent == structure.provenance["values"] <= 700


@pytest.mark.parametrize("seed", range(2))
def test_the_mean_of_two_clients_values_of_both_is_the_mean_of_their_models(
    folder: Path, whole: Space, seed: int
) -> None:
    structure = random_structure(whole, 1200, seed=seed)
    assert structure.mask is not None

    def trained(values: torch.Tensor | None, draw: int) -> tuple[torch.Tensor, nn.Module]:
        backbone = load(folder)
        scope = maskable_weights(backbone.model, backbone.head)
        pet = PetModel(backbone, build_mask(scope, MaskConfig(), structure.mask), structure, seed=0)
        if values is None:
            generator = torch.Generator().manual_seed(draw)
            values = 0.1 * torch.randn(pet.num_values, generator=generator)
        pet.set_delta(values, seed=draw)
        return values, pet.merge_and_unload()

    (one, first), (two, second) = trained(None, 1), trained(None, 2)
    _, mean = trained((one + two) / 2, 3)
    of_each = [dict(model.named_parameters()) for model in (first, second)]
    for name, parameter in mean.named_parameters():
        torch.testing.assert_close(parameter, (of_each[0][name] + of_each[1][name]) / 2, msg=name)


# -- a whole search, and what comes of it ------------------------------------------------------


def search(
    folder: Path, data: FederatedData, config: SearchConfig = CONFIG, **options: Any
) -> SearchResult:
    return run_search(
        load(folder), data.train, np.arange(len(data.train)), data.task, config, **options
    )


def test_a_search_of_both_finds_counts_and_modules_and_the_same_again(
    folder: Path, data: FederatedData
) -> None:
    found = search(folder, data)
    assert found.structure.mask is not None
    assert found.structure.modules
    assert found.structure.provenance["values"] <= 900
    assert len(found.structure.gates) == len(found.structure.modules)
    read = Structure.from_json(found.structure.to_json())
    assert read.mask == found.structure.mask
    assert read.modules == found.structure.modules
    assert search(folder, data).structure.to_json() == found.structure.to_json()
    backbone = load(folder)
    mask = build_mask(
        maskable_weights(backbone.model, backbone.head), MaskConfig(), found.structure.mask
    )
    assert mask.digest().hex() == found.structure.mask.sha256


def test_several_searches_average_alpha_and_a_cut_one_goes_on_with_the_same_bytes(
    folder: Path, data: FederatedData, tmp_path: Path
) -> None:
    config = replace(CONFIG, repeats=2, max_steps=2)
    found = search(folder, data, config)
    alone = [
        search(folder, data, replace(config, repeats=1, seed=seed))
        for seed in (config.seed, _seed_of_repeat(config))
    ]
    mean = (np.asarray(alone[0].alpha) + np.asarray(alone[1].alpha)) / 2
    np.testing.assert_allclose(found.alpha, mean, rtol=0, atol=1e-15)
    assert {entry["repeat"] for entry in found.history} == {0, 1}

    class StopError(Exception):
        pass

    steps = 0

    def stop(_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 3:  # in the second search
            raise StopError

    with pytest.raises(StopError):
        search(folder, data, config, state_file=tmp_path / "state", progress=stop)
    resumed = search(folder, data, config, state_file=tmp_path / "state")
    assert resumed.structure.to_json() == found.structure.to_json()


def test_the_heat_map_has_a_cell_a_weight_and_marks_those_with_entries(
    folder: Path, data: FederatedData
) -> None:
    structure = search(folder, data).structure
    heat = gate_map(structure)
    assert heat is not None
    assert structure.mask is not None
    masked = {key: gate for key, gate in heat.cells.items() if key[0].endswith(" mask")}
    marked = {f"{gate.target}.weight" for gate in masked.values() if gate.chosen}
    assert marked == set(structure.mask.entries)
    assert {gate.size for gate in masked.values()} == {72}  # three blocks of 24
    assert "entries of" in dict(structure_facts(structure))["chosen"]


def _seed_of_repeat(config: SearchConfig) -> int:
    from fedpet.utils.seeds import derive_seed

    return derive_seed("repeat", config.seed, 1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return (
        make_backbone(tmp_path_factory.mktemp("joint-backbone")),
        make_rows(tmp_path_factory.mktemp("joint-rows")),
    )


def structure_file(files: tuple[Path, Path], place: Path, **changes: Any) -> Path:
    backbone = load(files[0])
    found = random_structure(space_of(backbone), 600, seed=1, fingerprint=backbone.fingerprint)
    table = json.loads(found.to_json())
    table["mask"] |= changes
    path = place / "structure.json"
    path.write_text(json.dumps(table))
    return path


def planned(files: tuple[Path, Path], place: Path, path: Path, **changes: Any) -> Prepared:
    experiment = make_experiment(*files, place / "run", structure_file=str(path), **changes)
    prepared = prepare(experiment, Silent())
    assert isinstance(prepared, Prepared)
    return prepared


@pytest.mark.parametrize("broadcast", ["recompute", "send"])
def test_nodes_cut_the_same_mask_from_the_counts_of_a_plan(
    files: tuple[Path, Path], tmp_path: Path, broadcast: str
) -> None:
    path = structure_file(files, tmp_path)
    prepared = planned(files, tmp_path, path, mask_broadcast=broadcast)
    plan = Plan.from_bytes(prepared.plan.to_bytes())
    assert plan.structure.mask is not None
    node = plan.build(load(files[0]))
    assert node.mask is not None
    assert prepared.pet.mask is not None
    assert node.mask.digest() == prepared.pet.mask.digest()
    assert node.segments == prepared.pet.segments
    sizes = {s.name: s.size for s in node.segments if s.kind == "mask"}
    assert sizes == plan.structure.mask.entries


def test_a_plan_without_counts_has_the_bytes_that_it_always_had(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    prepared = prepare(make_experiment(*files, tmp_path / "run"), Silent())
    assert isinstance(prepared, Prepared)
    assert b'"provenance":{}}' in prepared.plan._header()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"mask_enabled": False}, "mask.enabled is false"),
        ({"mask_rule": "largest"}, "searched with mask.rule = 'smallest'"),
        ({"mask_tiers": ["0.01=0.5", "0.05=0.5"]}, "Remove mask.tiers"),
    ],
)
def test_an_experiment_whose_mask_is_not_the_searched_one_is_refused(
    files: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    path = structure_file(files, tmp_path)
    with pytest.raises(ConfigError, match=told):
        planned(files, tmp_path, path, **changes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"entries": {"no.such.weight": 5}}, "has 0 in scope"),
        ({"entries": {"bert.encoder.layer.0.attention.self.query.weight": 10**6}}, "takes 1000000"),
        ({"sha256": "00" * 32}, "take the checkpoint that it was searched on"),
        ({"entries": {}}, "counts of at least 1"),
        ({"entries": {"w": 0}}, "counts of at least 1"),
        ({"entries": {"w": True}}, "counts of at least 1"),
        ({"entries": [1]}, "counts by names of weights"),
        ({"rule": "best"}, "mask.rule"),
        ({"rule": 3}, 'a "rule"'),
        ({"deep": 1}, "unknown key 'deep' in a structure's mask"),
    ],
)
def test_counts_that_do_not_fit_are_refused_with_what_came(
    files: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(StructureError, match=told):
        planned(files, tmp_path, structure_file(files, tmp_path, **changes))


def test_the_joint_space_without_a_mask_to_search_is_refused(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    experiment = make_experiment(
        *files, tmp_path / "run", **SEARCH, search_space="joint", mask_enabled=False
    )
    with pytest.raises(ConfigError, match=r"it needs mask\.enabled = true"):
        prepare(experiment, Silent())


@pytest.mark.parametrize("sends", ["values", "gates"])
def test_clients_search_mask_and_structure_together_and_train_what_they_found(
    files: tuple[Path, Path], tmp_path: Path, sends: str
) -> None:
    settings = {**SEARCH, "search_budget": 800, "search_space": "joint", "search_mask_block": 16}
    experiment = make_experiment(*files, tmp_path / "run", **settings, search_sends=sends)
    summary = run_whole(experiment)
    found = structure_of(tmp_path / "run")
    assert found.mask is not None
    assert found.provenance["values"] <= 800
    assert summary["model"]["mask_values"] == found.mask.num_values
    assert (
        summary["model"]["communicated_values"]
        == found.provenance["values"] + (summary["model"]["head_values"])
    )
    assert summary["model"]["inexact_kinds"] == []
    up = [line["uplink_bytes"] for line in lines_of(tmp_path / "run", "search")]
    candidates = len(found.provenance["candidates"])
    if sends == "gates":  # float32 here, of each of six clients: alpha and the head
        gates = 6 * 4 * (candidates + summary["model"]["head_values"])
        assert all(gates * 0.5 < each < gates + 6 * 800 for each in up), (up, gates)
    else:
        assert min(up) > 6 * 4 * found.provenance["space"]["values"] * 0.25


def test_gates_alone_move_alpha_from_what_the_candidates_would_do(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = {**SEARCH, "search_space": "joint", "search_sends": "gates"}
    run_whole(make_experiment(*files, tmp_path / "run", **settings))
    gates = [c["gate"] for c in structure_of(tmp_path / "run").provenance["candidates"]]
    assert np.std(gates) > 1e-3


def test_steps_before_the_gates_move_the_values_alone(folder: Path, data: FederatedData) -> None:
    config = replace(CONFIG, warmup_steps=2)
    pet, space = put_on(load(folder))
    search = BiLevel(pet, space, config, total_steps=4, loss=cross_entropy)
    split = split_rows(np.arange(len(data.train)), config)
    moved_values = []
    for number, (theta, alpha) in enumerate(step_batches(data.train, split, config, 0, 4)):
        search.step(theta, alpha)
        moved_values.append(float(pet.get_delta().abs().sum()))
        assert bool(search.alpha.any()) == (number >= 2)
    assert 0 < moved_values[0] < moved_values[1]
    with pytest.raises(ConfigError, match="must leave steps in which gates move, got 4 of 4"):
        BiLevel(pet, space, replace(config, warmup_steps=4), total_steps=4, loss=cross_entropy)


@pytest.mark.parametrize("gates", ["open", "drawn"])
def test_gates_that_are_open_before_they_move_are_drawn_from_then_on(
    folder: Path, data: FederatedData, monkeypatch: pytest.MonkeyPatch, gates: str
) -> None:
    config = replace(CONFIG, warmup_steps=2, warmup_gates=gates)
    pet, space = put_on(load(folder))
    search = BiLevel(pet, space, config, total_steps=4, loss=cross_entropy)
    split, opened = split_rows(np.arange(len(data.train)), config), []
    set_gates = pet.set_gates

    def watched(values: torch.Tensor) -> None:
        opened.append(bool((values == 1).all()))
        set_gates(values)

    monkeypatch.setattr(pet, "set_gates", watched)
    for theta, alpha in step_batches(data.train, split, config, 0, 4):
        search.step(theta, alpha)
    assert opened[:2] == [gates == "open"] * 2
    assert not any(opened[2:])


def cross_entropy(model: Any, inputs: Any, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(**inputs).logits, labels)


# -- HiWi on biases ------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2])
def test_an_adapter_on_a_bias_can_move_wherever_and_however_it_is_drawn(
    folder: Path, rank: int
) -> None:
    backbone = load(folder)
    generator = torch.Generator().manual_seed(5)
    targets = [
        f"bert.encoder.layer.{layer}.{part}.dense"
        for layer in (0, 1)
        for part in ("intermediate", "output")
    ]
    with torch.no_grad():
        for number, target in enumerate(targets):
            bias = backbone.model.get_submodule(target).bias
            bias.copy_(torch.randn(bias.shape, generator=generator) * (number > 0))  # one of zeros
    from fedpet.pet.modules.registry import spec_of

    specs = tuple(spec_of("hiwi-bias", target, rank=rank, scale=1.0) for target in targets)
    pet = PetModel(backbone, None, Structure(specs), seed=0)
    before = pet.get_delta()
    for seed in range(12):
        pet.set_delta(before, seed=seed)
        for module in pet.structure_modules:
            assert float(module._active().detach().max()) > 0, (seed, module.target)  # type: ignore[attr-defined]
            torch.testing.assert_close(
                module.read(), torch.zeros_like(module.read()), rtol=0, atol=0
            )
