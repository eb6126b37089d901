"""A structure searched by many clients: what a round is, what it may choose, what ends it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process_run import run
from search_runs import BUDGET, lines_of, structure_of
from tiny import Silent

from fedpet.backbone.pretrained import load_backbone
from fedpet.client.node_config import NodeConfig
from fedpet.config import Experiment, SearchConfig, StrategyConfig
from fedpet.errors import TrainingError
from fedpet.pet.structure import Structure
from fedpet.protocol.ledger import Ledger
from fedpet.run.federate import PreparedSearch, prepare
from fedpet.run.local_grid import LocalGrid
from fedpet.search import (
    BiLevel,
    Split,
    chosen_size,
    client_config,
    expected_size,
    solve_zeta,
    split_in_two,
    step_batches,
    temperature,
)
from fedpet.server.client_pool import ClientPool
from fedpet.strategies import StructureSearch
from fedpet.strategies.structure_search import overlap
from fedpet.training.loss import client_loss
from fedpet.utils.seeds import client_id64, derive_seed

# -- what a round is -----------------------------------------------------------------------------


def strategy_of(experiment: Experiment) -> tuple[StructureSearch, LocalGrid, PreparedSearch]:
    """The search of an experiment, before its first round."""
    prepared = prepare(experiment, Silent())
    assert isinstance(prepared, PreparedSearch)
    strategy = StructureSearch(
        plan=prepared.plan,
        tiers=prepared.tiers,
        population=ClientPool({c.id: len(c.rows) for c in prepared.data.clients}, {}),
        config=experiment.strategy,
        ledger=Ledger(),
        space=prepared.space,
    )
    return strategy, LocalGrid.of(NodeConfig.from_experiment(experiment), 1), prepared


@pytest.mark.parametrize(("space", "adjustment"), [("mergeable", 0.0), ("s3pet-mix", 1.0)])
def test_a_round_of_one_client_with_all_rows_is_that_many_central_steps(
    experiment: Any, space: str, adjustment: float
) -> None:
    """To the bit from the start; later on alpha and values come as float32 differences."""
    settings = experiment(
        clients_partition="iid",
        clients_num_clients=1,
        search_space=space,
        search_local_steps=5,
        search_beta_end=0.3,
        search_dropout=True,
        training_logit_adjustment=adjustment,
    )
    strategy, grid, prepared = strategy_of(settings)
    plan, data = prepared.plan, prepared.data
    assert plan.search is not None
    [client] = data.clients
    number = client_id64(client.id)
    config = client_config(plan.search, number)
    split = split_in_two(client.rows, config.seed, data.train.labels[client.rows])

    backbone = load_backbone(settings.backbone, num_outputs=2)
    model = plan.build_search(backbone)
    values = np.zeros(plan.num_values, dtype=np.float32)
    for number_of_round in (1, 2):
        seed = derive_seed("client", plan.seed, number_of_round, number)
        model.pet.set_delta(torch.from_numpy(values[: model.pet.num_values]), seed=seed)
        total = config.rounds * config.local_steps
        loss = client_loss(
            data.train.labels[client.rows], data.task, adjustment, torch.device("cpu")
        )
        central = BiLevel(model.pet, model.space, config, total_steps=total, loss=loss)
        done = (number_of_round - 1) * config.local_steps
        central.continue_from(done, torch.from_numpy(values[model.pet.num_values :]))
        for step, batch in enumerate(step_batches(data.train, split, config, 0, total)):
            if done <= step < done + config.local_steps:
                central.step(*batch)
        alpha = central.alpha.detach().float()
        values = torch.cat([model.pet.get_delta(), alpha]).numpy()
        strategy.run_round(grid)
        if number_of_round == 1:
            assert np.array_equal(strategy.values, values)
            assert torch.equal(strategy.alpha, alpha.double())
            assert len(set(alpha.tolist())) > 1
        else:
            assert strategy.values == pytest.approx(values, abs=1e-6)
        values = strategy.values


def test_a_client_s_rows_move_either_its_values_or_its_alpha_and_in_every_round_the_same() -> None:
    rows = np.arange(100, 131)
    split = split_in_two(rows, seed=3)
    assert len(split.theta) == len(split.alpha) == 15
    assert len({*split.theta, *split.alpha}) == 30 <= len(rows)
    assert {*split.theta, *split.alpha} < set(rows)
    again, other = split_in_two(rows, seed=3), split_in_two(rows, seed=4)
    assert np.array_equal(split.theta, again.theta)
    assert not np.array_equal(split.theta, other.theta)
    assert len(split_in_two(rows[:2], seed=0).theta) == 1
    with pytest.raises(TrainingError, match=r"two rows of a client .* has 1\. Raise clients"):
        split_in_two(rows[:1], seed=0)


@given(st.lists(st.integers(0, 4), min_size=2, max_size=40), st.integers(0, 99))
def test_a_client_s_halves_have_as_many_rows_of_each_class_to_one(
    labels: list[int], seed: int
) -> None:
    rows, classes = np.arange(len(labels)), np.asarray(labels)
    split = split_in_two(rows, seed, classes)
    assert len(split.theta) == len(split.alpha) == len(rows) // 2
    assert not {*split.theta} & {*split.alpha}
    counts = [np.bincount(classes[half], minlength=5) for half in (split.theta, split.alpha)]
    assert np.abs(counts[0] - counts[1]).max() <= 1


def test_the_steps_of_a_later_round_are_those_of_a_search_that_was_not_interrupted(
    files: tuple[Path, Path], experiment: Any
) -> None:
    data = prepare(experiment(), Silent()).data
    split = Split(np.arange(0, 11), np.arange(20, 31), np.arange(0))
    config = SearchConfig(batch_size=4, seed=5)
    whole = list(step_batches(data.train, split, config, 0, 14))
    pieces = [
        batch
        for start in (0, 5, 10)
        for batch in step_batches(data.train, split, config, start, min(start + 5, 14))
    ]
    assert len(whole) == len(pieces) == 14
    for (theta, alpha), (theta_again, alpha_again) in zip(whole, pieces, strict=True):
        assert torch.equal(theta["input_ids"], theta_again["input_ids"])
        assert torch.equal(alpha["labels"], alpha_again["labels"])


# -- law 8: the budget ---------------------------------------------------------------------------


def test_after_every_average_the_expected_size_is_the_budget_and_the_choice_is_inside(
    experiment: Any,
) -> None:
    strategy, grid, _ = strategy_of(experiment(search_beta_end=0.2))
    sizes = torch.tensor(strategy.space.sizes, dtype=torch.float64)
    while not strategy.is_over:
        strategy.run_round(grid)
        beta = temperature(strategy.search, strategy.rounds_done / strategy.search.rounds)
        zeta = solve_zeta(strategy.alpha, sizes, BUDGET, beta)
        assert expected_size(strategy.alpha, sizes, zeta, beta) == pytest.approx(BUDGET, rel=1e-9)
        assert float((strategy.probabilities.detach() * sizes).sum()) == pytest.approx(BUDGET)
        spent = chosen_size(strategy.choice(), strategy.space.sizes, strategy.space.tensors)
        assert 0 < spent <= BUDGET


def made(prepared: PreparedSearch, **changes: Any) -> StructureSearch:
    """A strategy whose search has other settings."""
    assert prepared.plan.search is not None
    plan = replace(prepared.plan, search=replace(prepared.plan.search, **changes))
    return StructureSearch(
        plan=plan,
        tiers=prepared.tiers,
        population=ClientPool({"client": 3}, {}),
        config=StrategyConfig(),
        ledger=Ledger(),
        space=prepared.space,
    )


@given(st.data())
@settings(max_examples=60)
def test_the_structure_never_exceeds_its_budget_whatever_alpha_came_out(
    searching: PreparedSearch, data: st.DataObject
) -> None:
    space = searching.space
    budget = data.draw(st.integers(min(space.sizes), space.num_values - 1))
    spread = data.draw(st.sampled_from([0.0, 0.1, 3.0, 300.0]))
    shift = data.draw(st.floats(-300, 300))
    seed = data.draw(st.integers(0, 2**32 - 1))
    strategy = made(searching, budget=budget)
    alpha = np.random.default_rng(seed).normal(shift, spread, len(space.sizes))
    strategy.values[-len(alpha) :] = alpha
    strategy.averaged = 1
    structure = strategy.structure({})
    sizes = space_sizes(searching, structure)
    assert sizes == structure.provenance["values"] <= budget
    assert len(structure.gates) == len(structure.modules)


def space_sizes(searching: PreparedSearch, structure: Structure) -> int:
    of = {(c.spec.kind, c.spec.target): i for i, c in enumerate(searching.space.candidates)}
    chosen = [of[spec.kind, spec.target] for spec in structure.modules]
    return chosen_size(chosen, searching.space.sizes, searching.space.tensors)


# -- when it is over -----------------------------------------------------------------------------


def test_a_search_is_over_when_the_choice_stays_often_enough_and_at_its_last_round(
    searching: PreparedSearch,
) -> None:
    strategy = made(searching, settled_overlap=0.75, settled_rounds=2, rounds=9)
    a, b, c = [1, 2, 3, 4], [1, 2, 3], [1, 2, 9]
    assert overlap(a, b) == 0.75
    assert overlap(b, c) == 0.5
    for choices, settled in (
        ([a], False),
        ([a, b], False),
        ([a, b, c], False),
        ([b, c, c], False),
        ([c, c, c], True),
        ([a, b, b], True),
    ):
        strategy._choices = choices
        assert strategy.has_settled == settled, choices
        assert strategy.is_over == settled
    strategy._choices = [a, c]
    for done, over in ((8, False), (9, True)):
        strategy.rounds_done = done
        assert strategy.is_over == over


def test_a_resolve_search_ends_before_its_last_round_and_says_so(experiment: Any) -> None:
    settings = experiment(search_rounds=9, search_settled_overlap=0.01, search_settled_rounds=2)
    run(settings)
    out = Path(settings.run.out)
    told = structure_of(out).provenance["search"]
    assert told["ended"] == "settled"
    assert told["rounds"] == told["averaged"] == len(lines_of(out, "search")) == 3
    overlaps = [line["overlap"] for line in lines_of(out, "search")]
    assert overlaps[0] is None
    assert overlaps[1:] == told["overlaps"]
    assert told["of"] == 9
    longer = experiment(search_settled_overlap=1.0, search_settled_rounds=3)
    run(longer)
    last = structure_of(Path(longer.run.out)).provenance["search"]
    assert (last["ended"], last["rounds"]) == ("all rounds", 3)
