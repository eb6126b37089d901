"""A structure searched by many clients: what a round is, what ends it, what it costs."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Silent

from fedpet import cli
from fedpet.backbone import load_backbone
from fedpet.client import Node
from fedpet.codec.frame import Frame, pack_frame, unpack_frames
from fedpet.config import Experiment, SearchConfig, StrategyConfig
from fedpet.errors import ConfigError, RunError, StructureError, TrainingError
from fedpet.ledger import Ledger
from fedpet.messages import read_request
from fedpet.node_settings import NodeSettings
from fedpet.plan import Plan
from fedpet.population import Population
from fedpet.report.gates import gate_map, structure_facts
from fedpet.report.page import page
from fedpet.report.reading import read_report
from fedpet.search import (
    BiLevel,
    SearchModel,
    Split,
    chosen_size,
    client_config,
    expected_size,
    solve_zeta,
    split_in_two,
    step_batches,
    temperature,
)
from fedpet.seeds import client_number, derive_seed
from fedpet.simulations.central_search import state_file
from fedpet.simulations.engine import simulate
from fedpet.simulations.federation import ToSearch, federate, prepare
from fedpet.simulations.journal import read_journal
from fedpet.simulations.local_grid import LocalGrid
from fedpet.simulations.resume import check_journal, found_before, read_cut_short
from fedpet.simulations.run_folder import RunFolder, new_run_folder
from fedpet.strategies import StructureSearch
from fedpet.strategies.structure_search import overlap
from fedpet.structure import Structure
from fedpet.training import local_loss

BUDGET = 600
SEARCH = {
    "search_federated": True,
    "search_budget": BUDGET,
    "search_batch_size": 4,
    "search_rate": 0.01,
    "search_rounds": 3,
    "search_local_steps": 2,
    "strategy_num_rounds": 1,
    "strategy_clients_per_round": 6,
}


@pytest.fixture
def experiment(files: tuple[Path, Path], tmp_path: Path) -> Callable[..., Experiment]:
    counter = iter(range(100))

    def make(**changes: Any) -> Experiment:
        out = tmp_path / f"run{next(counter)}"
        return tiny.make_experiment(*files, out, **{**SEARCH, **changes})

    return make


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(experiment: Experiment, grid: LocalGrid | None = None, nodes: int = 1) -> dict[str, Any]:
    grid = grid or LocalGrid.of(NodeSettings.of(experiment), nodes)
    return federate(grid, prepare(experiment, Silent()), new_run_folder(experiment), Silent())


def lines_of(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "rounds.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line.get("kind", "training") == kind]


def structure_of(run: Path) -> Structure:
    return Structure.from_json((run / "structure.json").read_text(encoding="utf-8"))


# -- what a round is -----------------------------------------------------------------------------


def strategy_of(
    experiment: Experiment, **changes: Any
) -> tuple[StructureSearch, LocalGrid, ToSearch]:
    """The search of an experiment, before its first round."""
    prepared = prepare(experiment, Silent())
    assert isinstance(prepared, ToSearch)
    strategy = StructureSearch(
        plan=prepared.plan,
        tiers=prepared.tiers,
        population=Population({c.id: len(c.rows) for c in prepared.data.clients}, {}),
        config=experiment.strategy,
        ledger=Ledger(),
        space=prepared.space,
    )
    return strategy, LocalGrid.of(NodeSettings.of(experiment), 1), prepared


@pytest.mark.parametrize(("space", "adjustment"), [("mergeable", 0.0), ("s3pet-mix", 1.0)])
def test_a_round_of_one_client_with_all_rows_is_that_many_central_steps(
    experiment: Any, space: str, adjustment: float
) -> None:
    """To the bit from the start; later on alpha and values come as float32 differences."""
    settings = experiment(
        population_partition="iid",
        population_num_clients=1,
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
    number = client_number(client.id)
    config = client_config(plan.search, number)
    split = split_in_two(client.rows, config.seed)

    backbone = load_backbone(settings.backbone, num_outputs=2)
    model = plan.build_search(backbone)
    values = np.zeros(plan.num_values, dtype=np.float32)
    for number_of_round in (1, 2):
        seed = derive_seed("client", plan.seed, number_of_round, number)
        model.pet.load_values(torch.from_numpy(values[: model.pet.num_values]), seed=seed)
        total = config.rounds * config.local_steps
        loss = local_loss(data.train.labels[client.rows], data.task, adjustment)
        central = BiLevel(model.pet, model.space, config, total_steps=total, loss=loss)
        done = (number_of_round - 1) * config.local_steps
        central.begin_at(done, torch.from_numpy(values[model.pet.num_values :]))
        for step, batch in enumerate(step_batches(data.train, split, config, 0, total)):
            if done <= step < done + config.local_steps:
                central.step(*batch)
        alpha = central.alpha.detach().float()
        values = torch.cat([model.pet.values(), alpha]).numpy()
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
    with pytest.raises(TrainingError, match=r"two rows of a client .* has 1\. Raise population"):
        split_in_two(rows[:1], seed=0)


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


# -- law 6 ---------------------------------------------------------------------------------------


def test_the_order_of_replies_and_the_spread_over_nodes_change_no_bit(experiment: Any) -> None:
    class Reversed(LocalGrid):
        def pull_messages(self, message_ids: Any) -> Any:
            return list(super().pull_messages(message_ids))[::-1]

    found = set()
    for nodes, kind in ((1, LocalGrid), (3, LocalGrid), (3, Reversed)):
        settings = experiment()
        node = NodeSettings.of(settings)
        grid = kind({n: Node(node).answer for n in range(1, nodes + 1)})
        result = run(settings, grid)
        text = (Path(settings.run.out) / "structure.json").read_bytes()
        found.add((hashlib.sha256(text).hexdigest(), result["final_values_sha256"]))
    assert len(found) == 1


def test_nodes_that_bring_their_own_files_search_what_the_simulation_does(
    experiment: Any, files: tuple[Path, Path], tmp_path: Path
) -> None:
    (server := tmp_path / "server").mkdir()
    shutil.copy(files[1] / "test.jsonl", server)
    settings = experiment(
        population_partition="nodes", population_num_clients=6, strategy_node_wait_seconds=5.0
    )
    settings = replace(settings, data=replace(settings.data, source=str(server)))
    lines = (files[1] / "train.jsonl").read_text(encoding="utf-8").splitlines()
    nodes: dict[int, Callable[[bytes], bytes]] = {}
    for node, clients in {7: ("client 0", "client 4", "client 2"), 5: ("client 1",)}.items():
        nodes[node] = node_with(tmp_path / f"node{node}", settings, lines, clients)
    nodes[9] = node_with(tmp_path / "node9", settings, lines, ("client 3", "client 5"))
    deployed = run(settings, LocalGrid(nodes))
    simulated = experiment()
    expected = run(simulated)
    assert deployed["refused"] == []
    assert deployed["final_values_sha256"] == expected["final_values_sha256"]
    found = [structure_of(Path(s.run.out)) for s in (settings, simulated)]
    assert found[0].modules == found[1].modules
    assert found[0].gates == found[1].gates
    assert found[0].provenance["search"]["clients"] == 6
    assert deployed["data"] == expected["data"]


def node_with(
    folder: Path, settings: Experiment, lines: list[str], clients: tuple[str, ...]
) -> Callable[[bytes], bytes]:
    """A node whose own file holds the rows of some clients."""
    folder.mkdir()
    own = [line for line in lines if json.loads(line)["client"] in clients]
    (folder / "rows.jsonl").write_text("\n".join(own) + "\n", encoding="utf-8")
    config = {"data": str(folder / "rows.jsonl"), "cache": str(folder / "cache")}
    return Node(NodeSettings.of(settings).on(config)).answer


def test_training_after_a_search_is_training_with_the_structure_s_file(experiment: Any) -> None:
    together = experiment()
    found = run(together)
    file = Path(together.run.out) / "structure.json"
    apart = run(experiment(search_federated=False, structure_file=str(file)))
    assert found["final_values_sha256"] == apart["final_values_sha256"]
    assert found["run"]["plan_digest"] == apart["run"]["plan_digest"]
    assert found["quality"] == apart["quality"]
    assert found["model"] == apart["model"]


def test_a_search_that_is_not_switched_on_leaves_no_trace_in_plan_lines_or_result(
    experiment: Any,
) -> None:
    settings = experiment(search_federated=False)
    result = run(settings)
    out = Path(settings.run.out)
    plan = (out / "plan.bin").read_bytes()
    assert Plan.from_bytes(plan).search is None
    assert Plan.from_bytes(plan).to_bytes() == plan
    assert "by_kind" not in result["communication"]
    assert "search_rounds_seconds" not in result["time"]
    assert all("kind" not in line for line in lines_of(out, "training"))


@pytest.mark.simulation
@pytest.mark.timeout(300)
def test_one_and_two_ray_workers_search_the_same_structure(experiment: Any) -> None:
    found = set()
    for workers in (1, 2):
        result, folder = simulate(experiment(run_workers=workers), Silent())
        text = (folder.path / "structure.json").read_bytes()
        found.add((hashlib.sha256(text).hexdigest(), result["final_values_sha256"]))
    assert len(found) == 1


@pytest.mark.simulation
@pytest.mark.timeout(300)
def test_a_search_alone_leaves_the_structure_that_a_run_trains(
    experiment: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import tomli_w

    settings = experiment()
    run(settings)
    file, out = tmp_path / "alone.toml", tmp_path / "alone.json"
    tables = replace(settings, search=replace(settings.search, federated=False)).to_tables()
    file.write_text(tomli_w.dumps(tables), encoding="utf-8")
    arguments = ["fedpet", "search", str(file), "--federated", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    cli.main()
    printed = capsys.readouterr()
    assert "search round 3/3: " in printed.err
    assert "of the choice as before" in printed.err
    assert "ended: all rounds" in " ".join(printed.out.split())
    assert out.read_bytes() == (Path(settings.run.out) / "structure.json").read_bytes()
    assert not state_file(out).exists()
    lines = out.with_name("alone.json.rounds.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["search"] * 3


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


@pytest.fixture(scope="module")
def searching(files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> ToSearch:
    out = tmp_path_factory.mktemp("searching") / "run"
    prepared = prepare(tiny.make_experiment(*files, out, **SEARCH), Silent())
    assert isinstance(prepared, ToSearch)
    return prepared


def made(prepared: ToSearch, **changes: Any) -> StructureSearch:
    """A strategy whose search has other settings."""
    assert prepared.plan.search is not None
    plan = replace(prepared.plan, search=replace(prepared.plan.search, **changes))
    return StructureSearch(
        plan=plan,
        tiers=prepared.tiers,
        population=Population({"client": 3}, {}),
        config=StrategyConfig(),
        ledger=Ledger(),
        space=prepared.space,
    )


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_the_structure_never_exceeds_its_budget_whatever_alpha_came_out(
    searching: ToSearch, data: st.DataObject
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


def space_sizes(searching: ToSearch, structure: Structure) -> int:
    of = {(c.spec.kind, c.spec.target): i for i, c in enumerate(searching.space.candidates)}
    chosen = [of[spec.kind, spec.target] for spec in structure.modules]
    return chosen_size(chosen, searching.space.sizes, searching.space.tensors)


# -- when it is over -----------------------------------------------------------------------------


def test_a_search_is_over_when_the_choice_stays_often_enough_and_at_its_last_round(
    searching: ToSearch,
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


def test_a_settled_search_ends_before_its_last_round_and_says_so(experiment: Any) -> None:
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


# -- law 7: a wrong reply ------------------------------------------------------------------------


def spoil(
    node: Callable[[bytes], bytes], change: Callable[[Frame], bytes]
) -> Callable[[bytes], bytes]:
    """A node whose answers of the search for client 2 are changed on their way."""

    def answer(payload: bytes) -> bytes:
        out, whole = [], node(payload)
        plan = read_request(payload).plan
        is_search.append(bool(plan) and Plan.from_bytes(plan).search is not None)
        for frame in unpack_frames(whole, max_frames=99, max_payload_bytes=len(whole)):
            assert isinstance(frame, Frame)
            spoiled = is_search[0] and len(is_search) == 1 and frame.client == VICTIM
            out.append(change(frame) if spoiled else pack_frame(frame))
        return b"".join(out)

    is_search: list[bool] = []
    return answer


VICTIM = client_number("client 2")
WRONG: dict[str, Callable[[Frame], bytes]] = {
    "values by": lambda f: pack_frame(replace(f, count=f.count - 1)),
    "is of plan": lambda f: pack_frame(replace(f, plan_digest=b"\1" * 16)),
    "is of round 2": lambda f: pack_frame(replace(f, server_round=2)),
    "may have a payload": lambda f: pack_frame(replace(f, payload=bytes(9 * f.count + 5000))),
    "bytes": lambda f: pack_frame(replace(f, payload=bytes(f.payload) + b"more")),
}


@pytest.mark.parametrize("word", WRONG)
def test_a_wrong_reply_of_a_search_is_refused_by_name_and_the_round_goes_on(
    experiment: Any, word: str
) -> None:
    settings = experiment()
    # The victim is alone on its node, so that a reply that cannot be read at all is its own.
    alone = spoil(Node(NodeSettings.of(settings)).answer, WRONG[word])
    grid = LocalGrid({n: spoil(Node(NodeSettings.of(settings)).answer, WRONG[word])
                      for n in range(1, 6)} | {6: alone})  # fmt: skip
    result = run(settings, grid)
    [refused] = result["refused"]
    assert refused["kind"] == "search"
    assert refused["who"] == "client 2"
    assert word in refused["reason"]
    first, *rest = lines_of(Path(settings.run.out), "search")
    assert (first["clients"], first["replies"], first["aggregated"]) == (6, 5, True)
    assert all(line["replies"] == 6 for line in rest)


def test_a_client_whose_search_gives_nan_is_refused_by_name(
    experiment: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = SearchModel.search_rows

    def search_rows(self: SearchModel, *args: Any, **kwargs: Any) -> Any:
        trained = honest(self, *args, **kwargs)
        if kwargs["server_round"] == 2:
            self.alpha[3] = math.nan
        return trained

    monkeypatch.setattr(SearchModel, "search_rows", search_rows)
    settings = experiment()
    result = run(settings)
    assert len(result["refused"]) == 6
    assert {entry["round"] for entry in result["refused"]} == {2}
    assert "NaN" in result["refused"][0]["reason"]
    told = structure_of(Path(settings.run.out)).provenance["search"]
    assert (told["rounds"], told["averaged"]) == (3, 2)


def test_a_search_without_a_usable_reply_ends_the_run_and_says_why(
    experiment: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: SearchModel, *args: Any, **kwargs: Any) -> Any:
        raise TrainingError("a loss became nan at step 1 of the search.")

    monkeypatch.setattr(SearchModel, "search_rows", broken)
    with pytest.raises(RunError, match="no round of the search met its quorum"):
        run(experiment())


def test_a_plan_of_a_search_with_another_layout_is_refused_by_the_node(
    searching: ToSearch, files: tuple[Path, Path]
) -> None:
    plan = searching.plan
    assert Plan.from_bytes(plan.to_bytes()) == plan
    assert plan.search is not None
    other = replace(plan, search=replace(plan.search, rank=2))
    backbone = load_backbone(searching.experiment.backbone, num_outputs=2)
    with pytest.raises(Exception, match="the layout here has"):
        other.build_search(backbone)


# -- the books -----------------------------------------------------------------------------------


def test_the_bytes_of_a_search_are_those_of_its_messages_and_told_apart(experiment: Any) -> None:
    settings = experiment()
    result = run(settings, nodes=6)
    books = result["communication"]
    search, training = books["by_kind"]["search"], books["by_kind"]["training"]
    # One client a node; the ids in a message's metadata are shorter here than between machines.
    assert search["total_bytes"] == pytest.approx(search["wire_bytes"], rel=0.02)
    assert training["total_bytes"] == pytest.approx(training["wire_bytes"], rel=0.02)
    assert (search["rounds"], training["rounds"]) == (3, 1)
    sent = books["wire_by_kind"]
    kinds = {f"{kind} {way}" for kind in ("search", "train") for way in ("up", "down")}
    assert set(sent) == kinds | {"plan down"}
    assert sent["search up"] + sent["search down"] < search["wire_bytes"]  # the rest is the plan
    assert (search["messages"], training["messages"]) == (36, 12)
    for name in ("uplink_bytes", "downlink_bytes", "plan_bytes", "wire_bytes", "total_bytes"):
        assert books[name] == search[name] + training[name]
    out = Path(settings.run.out)
    for kind in ("search", "training"):
        for name in ("uplink_bytes", "downlink_bytes", "plan_bytes"):
            lines = lines_of(out, kind)
            assert sum(line[name] for line in lines) == books["by_kind"][kind][name]
    told = structure_of(out).provenance["search"]
    assert [told[name] for name in ("uplink_bytes", "downlink_bytes", "plan_bytes")] == [
        search[name] for name in ("uplink_bytes", "downlink_bytes", "plan_bytes")
    ]
    assert books["uplink_bytes_per_client_round"] == training["uplink_bytes"] / 6


@pytest.mark.parametrize(
    "changes",
    [
        {"codec_up": "eden-4", "codec_down": "eden-4"},
        {"codec_up": "topk-0.5+int8", "codec_head_up": "float32", "codec_error_feedback": True},
        {"mask_tiers": "0.01=0.5,0.05=0.5"},
        {"mask_enabled": False, "mask_broadcast": "explicit"},
        {"strategy_name": "fedadam"},
    ],
)
def test_a_search_takes_codec_tiers_and_mask_as_training_does(
    experiment: Any, changes: dict[str, Any]
) -> None:
    settings = experiment(**changes)
    result, again = run(settings), run(experiment(**changes), nodes=3)
    assert result["refused"] == []
    assert result["final_values_sha256"] == again["final_values_sha256"]
    assert not list((Path(settings.run.cache) / "state").glob("*/*"))


def test_the_structure_tells_how_it_was_found_and_the_page_shows_its_gates(
    experiment: Any, files: tuple[Path, Path]
) -> None:
    settings = experiment(search_space="s3pet-mix")
    result = run(settings)
    out = Path(settings.run.out)
    structure = structure_of(out)
    told = structure.provenance
    assert told["method"] == "s3pet"
    assert told["federated"] is True
    assert told["search"]["clients"] == 6
    assert told["data"] == {"source": str(files[1]), "split": "train", "rows": 72}
    assert {"lora-factors", "lowrank-adapter"} <= set(told["inexact_kinds"])
    assert any("not exact" in text for text in told["deviations"])
    assert "last checkpoint" in told["deviations"]
    assert result["model"]["structure_values"] == told["values"] <= BUDGET
    gates = gate_map(structure)
    assert gates is not None
    assert sum(gate.chosen for gate in gates.cells.values()) == len(structure.modules)
    facts = dict(structure_facts(structure))
    assert "3 rounds of at most 3 on 6 clients" in facts["searched in"]
    text = page(read_report(out))
    assert "Gates of the search" in text
    assert text.count('class="chosen"') == len(structure.modules)
    assert "of it in 3 rounds of a search" in text
    assert ">search 3<" in text


def test_the_model_after_search_and_training_is_plain_and_gives_the_adapted_outputs(
    experiment: Any,
) -> None:
    from transformers import AutoModelForSequenceClassification

    settings = experiment(strategy_num_rounds=2)
    result = run(settings)
    assert result["model"]["inference_parameters_added"] == 0
    out = Path(settings.run.out)
    saved = AutoModelForSequenceClassification.from_pretrained(out / "model").eval()
    plan = Plan.from_bytes((out / "plan.bin").read_bytes())
    assert plan.search is None
    pet = plan.build(load_backbone(settings.backbone, num_outputs=2))
    pet.load_values(torch.from_numpy(np.load(out / "checkpoint" / "values.npy")), seed=plan.seed)
    ids = torch.tensor([[2, 5, 9, 7, 3], [2, 6, 11, 8, 3]])
    with torch.no_grad():
        adapted, plain = pet.model.eval()(ids).logits, saved(ids).logits
    assert torch.allclose(adapted, plain, atol=1e-5)


# -- cut short -----------------------------------------------------------------------------------


LOSSY = {"codec_up": "eden-4", "codec_down": "eden-4"}
TWO_ROUNDS = {"strategy_num_rounds": 2}


@pytest.fixture(scope="module")
def whole(
    files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[dict[str, Any]], tuple[Path, dict[str, Any]]]:
    """Runs that were not cut short, each made once: folder and result."""
    done: dict[str, tuple[Path, dict[str, Any]]] = {}

    def make(changes: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
        key = repr(changes)
        if key not in done:
            out = tmp_path_factory.mktemp("whole") / "run"
            found = run(tiny.make_experiment(*files, out, **{**SEARCH, **TWO_ROUNDS, **changes}))
            done[key] = out, found
        return done[key]

    return make


@pytest.mark.parametrize(("changes", "stop"), [({}, 1), ({}, 3), ({}, 4), ({}, 5), (LOSSY, 2)])
def test_a_run_cut_short_in_or_after_its_search_goes_on_to_the_same_bytes(
    experiment: Any, whole: Any, stop: int, changes: dict[str, Any]
) -> None:
    out, expected = whole(changes)

    class Stops(LocalGrid):
        def pull_messages(self, message_ids: Any) -> Any:
            replies = super().pull_messages(message_ids)
            self.rounds = getattr(self, "rounds", 0) + bool(replies)
            if self.rounds == stop:
                raise KeyboardInterrupt
            return replies

    cut = experiment(**TWO_ROUNDS, **changes)
    with pytest.raises(KeyboardInterrupt):
        run(cut, Stops.of(NodeSettings.of(cut), 1))
    result = gone_on_with(Path(cut.run.out))
    assert result["final_values_sha256"] == expected["final_values_sha256"]
    assert result["run"]["resumed"] == (stop > 1)  # before the first journal it begins again
    for name in ("uplink_bytes", "downlink_bytes", "plan_bytes"):
        assert result["communication"][name] == expected["communication"][name]
    text = [(folder / "structure.json").read_bytes() for folder in (out, Path(cut.run.out))]
    assert text[0] == text[1]


def gone_on_with(out: Path) -> dict[str, Any]:
    settings = read_cut_short(out)
    prepared = prepare(settings, Silent(), found=found_before(out))
    grid = LocalGrid.of(NodeSettings.of(settings), 1)
    return federate(grid, prepared, RunFolder(out), Silent(), check_journal(out, prepared))


def test_a_run_killed_between_its_search_and_its_training_keeps_the_search_s_books(
    experiment: Any, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, expected = whole({})
    cut = experiment(**TWO_ROUNDS)

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ToSearch, "found", stop)
        with pytest.raises(KeyboardInterrupt):
            run(cut)
    out = Path(cut.run.out)
    journal = read_journal(out)
    assert journal is not None
    assert journal.kind == "search"
    assert found_before(out) == structure_of(out)
    result = gone_on_with(out)
    assert result["final_values_sha256"] == expected["final_values_sha256"]
    assert len(lines_of(out, "search")) == 3


def test_a_structure_s_file_that_the_search_did_not_leave_does_not_end_it(experiment: Any) -> None:
    cut = experiment()

    class Stops(LocalGrid):
        def push_messages(self, messages: Any) -> Any:
            self.rounds = getattr(self, "rounds", 0) + 1
            if self.rounds == 2:
                raise KeyboardInterrupt
            return super().push_messages(messages)

    with pytest.raises(KeyboardInterrupt):
        run(cut, Stops.of(NodeSettings.of(cut), 1))
    out = Path(cut.run.out)
    (out / "structure.json").write_text(Structure().to_json(), encoding="utf-8")
    assert found_before(out) is None
    gone_on_with(out)
    assert structure_of(out).modules


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"search_budget": 5}, StructureError, "must hold at least the smallest candidate"),
        ({"search_budget": 10**7}, StructureError, "must be below the .* values of the whole"),
        ({"structure_file": "found.json"}, ConfigError, "structure.file names 'found.json': leave"),
        ({"search_method": "random"}, ConfigError, "search.federated searches by 's3pet'"),
        ({"search_rounds": 0}, ConfigError, "search.rounds must be at least 1"),
        ({"search_settled_overlap": 0.0}, ConfigError, r"settled-overlap must be in \(0, 1\]"),
        ({"strategy_name": "krum"}, ConfigError, "averages what clients send, and strategy 'krum'"),
        (
            {"search_mask_in_budget": True, "mask_density": 0.5},
            StructureError,
            "the budget of 600 values must hold the mask",
        ),
        ({"search_budget": "2kB", "codec_up": "topk-0.1+int8"}, ConfigError, "sends every value"),
    ],
)
def test_bad_input_is_told_in_a_sentence_before_anything_runs(
    experiment: Any, changes: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        prepare(experiment(**changes), Silent())


def test_a_cost_that_depends_on_the_search_is_not_estimated(experiment: Any) -> None:
    from fedpet.estimate import estimate

    with pytest.raises(ConfigError, match=r"search\.federated finds it in the run"):
        estimate(experiment())
