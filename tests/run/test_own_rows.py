"""Clients measure on rows that they do not train on: nothing else of a run is changed by it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from in_process_run import run
from roll_call_runs import on_nodes, three_nodes
from tiny import Silent

from fedpet.client import own_rows
from fedpet.client import train_client as client_module
from fedpet.client.node import Node
from fedpet.client.node_config import NodeConfig
from fedpet.config import Experiment
from fedpet.errors import ConfigError
from fedpet.pet.layout import head_groups, quantisation_groups
from fedpet.protocol.codec_seeds import uplink_seeds
from fedpet.protocol.frame import Frame, unpack_frames
from fedpet.protocol.request import EvaluationRequest, read_request, write_request
from fedpet.run import ray_engine
from fedpet.run.federate import federate, prepare
from fedpet.run.local_grid import LocalGrid
from fedpet.run.resume import check_journal, read_cut_short
from fedpet.run.run_folder import RunFolder, new_run_folder
from fedpet.server.client_spread import spread_of
from fedpet.training.evaluation import predict
from fedpet.utils.seeds import client_id64

FRACTION = 0.3
OWN = {"clients_eval_fraction": FRACTION}
Make = Callable[..., Experiment]


def is_held_out(line: str) -> bool:
    """The rule by hand: the second six bytes of the text's SHA-256."""
    digest = hashlib.sha256(json.loads(line)["text"].encode()).digest()
    return int.from_bytes(digest[6:12], "big") / 2**48 < FRACTION


@pytest.fixture(scope="module")
def two_runs(
    files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Experiment, dict[str, list[Frame]]]:
    """A run of two rounds, its experiment, and the frames of each client."""
    folder = tmp_path_factory.mktemp("own")
    experiment = tiny.make_experiment(*files, folder / "run", strategy_num_rounds=2, **OWN)
    node = Node(NodeConfig.from_experiment(experiment))
    frames: dict[str, list[Frame]] = {}

    def answer(payload: bytes) -> bytes:
        packed = node.answer(payload)
        for part in unpack_frames(packed, max_frames=99, max_payload_bytes=1 << 20):
            assert isinstance(part, Frame)
            frames.setdefault(f"{part.client:016x}", []).append(part)
        return packed

    return run(experiment, LocalGrid({1: answer})), experiment, frames


# -- training is what it would be ------------------------------------------------------------


def test_the_values_are_those_of_a_run_that_has_the_training_rows_alone(
    two_runs: Any, files: tuple[Path, Path], tmp_path: Path
) -> None:
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "test.jsonl").write_text((files[1] / "test.jsonl").read_text())
    lines = (files[1] / "train.jsonl").read_text().splitlines()
    (rows / "train.jsonl").write_text("\n".join(x for x in lines if not is_held_out(x)) + "\n")
    without = tiny.make_experiment(files[0], rows, tmp_path / "off", strategy_num_rounds=2)
    before = tiny.make_experiment(
        *files, tmp_path / "on", strategy_num_rounds=2, clients_eval_values="before", **OWN
    )
    expected = two_runs[0]["final_values_sha256"]
    assert run(without)["final_values_sha256"] == expected
    found = run(before)
    assert found["final_values_sha256"] == expected
    for way in ("uplink_bytes", "downlink_bytes", "messages"):
        assert found["communication"][way] == two_runs[0]["communication"][way]
    assert "after" not in found["quality"]["on_clients"]


def test_no_client_trains_on_a_row_that_it_holds_out(
    experiment: Make, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    train_rows = client_module.train_rows

    def note(*args: Any, **named: Any) -> Any:
        seen.extend(args[3].tolist())
        return train_rows(*args, **named)

    monkeypatch.setattr(client_module, "train_rows", note)
    run(experiment(strategy_num_rounds=1, strategy_clients_per_round=6, **OWN))
    lines = (files[1] / "train.jsonl").read_text().splitlines()
    assert sorted(seen) == [n for n, line in enumerate(lines) if not is_held_out(line)]


def test_a_client_that_would_be_left_with_too_few_rows_holds_out_none(experiment: Make) -> None:
    settled = experiment(clients_min_rows=9, clients_eval_fraction=0.3)
    clients = prepare(settled, Silent()).data.clients
    kept = {client.id: (len(client.rows), len(client.held_out)) for client in clients}
    assert all(sum(counts) == 12 and counts[0] >= 9 for counts in kept.values())
    assert any(not held for _, held in kept.values())
    with pytest.raises(ConfigError, match="leaves no client with a row to evaluate on"):
        prepare(experiment(clients_min_rows=12, clients_eval_fraction=0.3), Silent())


# -- the figures are those of a hand computation ----------------------------------------------


def test_a_client_s_figures_are_the_shares_of_its_rows_that_are_right(two_runs: Any) -> None:
    _, experiment, frames = two_runs
    prepared = prepare(experiment, Silent())
    data, pet = prepared.data, prepared.pet
    groups = quantisation_groups(pet.segments), head_groups(pet.segments)
    coding = prepared.plan.uplink(*groups)
    for client in data.clients:
        for frame in frames.get(f"{client_id64(client.id):016x}", []):
            assert frame.metric is not None
            assert frame.metric.num_rows == len(client.held_out)
            assert frame.num_examples == len(client.rows)
            if frame.server_round > 1:
                continue  # from values of zero the first update is what was trained
            seeds = uplink_seeds(prepared.plan.seed, 1, frame.client)
            update = coding.decode(frame.payload, **seeds)
            for found, values in ((frame.metric.before, 0 * update), (frame.metric.after, update)):
                pet.set_delta(torch.from_numpy(values.copy()), seed=0)
                right = [
                    predict(pet.model, data.train.take(np.array([row]))).argmax()
                    == data.train.labels[row]
                    for row in client.held_out
                ]
                assert found == np.mean(right)


def test_a_round_s_spread_is_that_of_its_frames(two_runs: Any) -> None:
    result, _, frames = two_runs
    for number in (1, 2):
        metrics = [f.metric for each in frames.values() for f in each if f.server_round == number]
        rows = np.array([metric.num_rows for metric in metrics])
        for name in ("before", "after"):
            values = np.array([getattr(metric, name) for metric in metrics])
            found = result["quality"]["on_clients"][name][number - 1]
            assert found["round"] == number - (name == "before")
            assert found["clients"] == len(metrics) == 4
            assert found["row_mean"] == pytest.approx((rows * values).sum() / rows.sum())
            assert found["mean"] == pytest.approx(values.mean())
            assert found["worst_decile"] == values.min()


def test_the_worst_tenth_is_the_mean_over_the_worst_clients() -> None:
    values = [n / 25 for n in range(25)]
    assert spread_of([(1, v) for v in values], "accuracy")["worst_decile"] == 0.02
    assert spread_of([(1, v) for v in values], "mae")["worst_decile"] == pytest.approx(0.94)
    assert spread_of([], "accuracy") == {}
    assert spread_of([(3, None)], "accuracy") == {"not_finite": 1}


def test_clients_that_train_at_once_measure_as_those_that_train_alone(
    two_runs: Any, experiment: Make
) -> None:
    settled = experiment(training_clients_at_once=4, strategy_num_rounds=1, **OWN)
    found = run(settled)["quality"]["on_clients"]
    for name in ("before", "after"):
        [spread], [expected, _] = found[name], two_runs[0]["quality"]["on_clients"][name]
        assert spread == pytest.approx(expected, abs=1e-6)


# -- law 6 -----------------------------------------------------------------------------------


def test_nodes_with_rows_of_their_own_hold_out_and_measure_the_same(
    two_runs: Any, experiment: Make, files: tuple[Path, Path]
) -> None:
    expected = two_runs[0]
    settled = on_nodes(experiment, strategy_num_rounds=2, **OWN)
    found = run(settled, LocalGrid(three_nodes(settled, files[1])))
    assert found["final_values_sha256"] == expected["final_values_sha256"]
    assert found["quality"]["on_clients"] == expected["quality"]["on_clients"]
    assert found["refused"] == []


@pytest.mark.simulation
@pytest.mark.timeout(600)
def test_workers_of_ray_measure_the_same(experiment: Make) -> None:
    changes = {**OWN, "clients_unseen_fraction": 0.3, "strategy_num_rounds": 2}
    expected = run(experiment(**changes))
    found, _ = ray_engine.simulate(experiment(**changes), Silent())
    assert found["refused"] == []
    assert found["final_values_sha256"] == expected["final_values_sha256"]
    assert found["quality"]["on_clients"] == expected["quality"]["on_clients"]


def test_a_server_without_rows_has_the_clients_metric(
    experiment: Make, files: tuple[Path, Path]
) -> None:
    changes = {"data_eval_on": "clients", "data_label_names": ["0", "1"], **OWN}
    settled = on_nodes(experiment, strategy_num_rounds=2, **changes)
    (Path(settled.data.source) / "test.jsonl").unlink()
    found = run(settled, LocalGrid(three_nodes(settled, files[1])))
    quality = found["quality"]
    assert [point["round"] for point in quality["by_round"]] == [0, 1, 2]
    assert quality["final"] == quality["on_clients"]["seen"][0]["row_mean"]
    assert found["data"]["evaluation_rows"] == 0
    assert "majority_baseline" not in quality
    simulated = run(experiment(strategy_num_rounds=2, clients_min_rows=2, **changes))
    assert simulated["quality"]["by_round"] == quality["by_round"]
    with pytest.raises(ConfigError, match="name all classes"):
        prepare(on_nodes(experiment, data_eval_on="clients", **OWN), Silent())


def test_a_server_without_rows_needs_clients_that_hold_some_out(experiment: Make) -> None:
    with pytest.raises(ConfigError, match=r"clients\.eval-fraction is 0"):
        experiment(data_eval_on="clients")


# -- clients that never train ----------------------------------------------------------------


def test_unseen_clients_never_train_and_measure_all_their_rows(
    experiment: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[int, int]] = []
    measure = own_rows._measure
    monkeypatch.setattr(
        own_rows, "_measure", lambda loaded, rows: measured.append(rows) or measure(loaded, rows)
    )
    settled = experiment(
        clients_unseen_fraction=0.3, strategy_num_rounds=2, strategy_clients_per_round=6
    )
    node = Node(NodeConfig.from_experiment(settled))
    asked: list[tuple[type, int]] = []

    def answer(payload: bytes) -> bytes:
        request = read_request(payload)
        asked.extend((type(request), client) for client in request.clients)
        return node.answer(payload)

    result = run(settled, LocalGrid({1: answer}))
    alone = {client for kind, client in asked if kind is EvaluationRequest}
    trained = {client for kind, client in asked if kind is not EvaluationRequest}
    assert len(alone) == result["data"]["clients_unseen"] == 1
    assert not alone & trained
    assert len(trained) == 5
    [unseen] = result["quality"]["on_clients"]["unseen"]
    assert (unseen["round"], unseen["clients"], unseen["rows"]) == (2, 1, 12)
    assert [len(rows) for rows in measured] == [12]
    books = result["communication"]["by_kind"]["evaluation"]
    assert books["messages"] == 2
    assert sum(b for k, b in result["communication"]["wire_by_kind"].items() if "eval" in k)
    assert abs(books["total_bytes"] - books["plan_bytes"] - books["wire_bytes"]) < 500


def test_a_node_trains_no_client_that_must_not(experiment: Make) -> None:
    settled = experiment(clients_unseen_fraction=0.3, strategy_num_rounds=1)
    node = Node(NodeConfig.from_experiment(settled))
    prepared = prepare(settled, Silent())
    rule = prepared.plan.evaluation
    assert rule is not None
    unseen = [client_id64(c.id) for c in prepared.data.clients if rule.is_unseen(c.id)]
    said: list[str] = []

    def answer(payload: bytes) -> bytes:
        request = read_request(payload)
        if not isinstance(request, EvaluationRequest):
            forged = write_request(type(request)(tuple(unseen), request.frame, request.plan))
            [part] = unpack_frames(node.answer(forged), max_frames=1, max_payload_bytes=0)
            said.append(part.reason)  # type: ignore[union-attr]
        return node.answer(payload)

    federate(LocalGrid({1: answer}), prepared, new_run_folder(settled), Silent())
    [reason] = said
    assert "never trains" in reason


def test_a_share_that_leaves_nobody_on_one_side_is_refused(experiment: Make) -> None:
    for fraction in (0.001, 0.99999):
        with pytest.raises(ConfigError, match="leaves some on either side"):
            prepare(experiment(clients_unseen_fraction=fraction), Silent())


# -- the best round --------------------------------------------------------------------------


def test_the_kept_model_is_that_of_the_best_round(experiment: Make) -> None:
    settled = experiment(run_keep="best", strategy_num_rounds=3)
    result = run(settled)
    measured = {p["round"]: p["value"] for p in result["quality"]["by_round"] if p["round"]}
    best = max(measured.values())
    kept = min(number for number, value in measured.items() if value == best)
    assert result["run"]["kept"] == {
        "round": kept, "by": "accuracy", "value": best, "on": "server", "of": 3
    }  # fmt: skip
    assert result["quality"]["final"] == best
    short = run(experiment(strategy_num_rounds=kept))
    assert result["final_values_sha256"] == short["final_values_sha256"]
    values = np.load(Path(settled.run.out) / "checkpoint" / "values.npy")
    assert hashlib.sha256(values.tobytes()).hexdigest() == short["final_values_sha256"]
    assert "kept" not in short["run"]


@pytest.mark.parametrize("stops_in", [2, 3])
def test_a_run_cut_short_keeps_the_same_round_and_the_same_figures(
    experiment: Make, stops_in: int
) -> None:
    class Stops(Silent):
        def on_round_end(self, record: Any, ledger: Any) -> None:
            if record.round == stops_in - 1 and record.kind == "training":
                raise KeyboardInterrupt

    changes = {
        **OWN, "data_eval_on": "clients", "run_keep": "best", "clients_unseen_fraction": 0.3,
        "clients_unseen_every": 1, "strategy_num_rounds": 3,
    }  # fmt: skip
    expected, cut = run(experiment(**changes)), experiment(**changes)
    grid = LocalGrid.of(NodeConfig.from_experiment(cut), 1)
    with pytest.raises(KeyboardInterrupt):
        federate(grid, prepare(cut, Silent()), new_run_folder(cut), Stops())
    folder = Path(cut.run.out)
    prepared = prepare(read_cut_short(folder), Silent())
    grid = LocalGrid.of(NodeConfig.from_experiment(prepared.experiment), 1)
    found = federate(grid, prepared, RunFolder(folder), Silent(), check_journal(folder, prepared))
    assert found["final_values_sha256"] == expected["final_values_sha256"]
    assert found["run"]["kept"] == expected["run"]["kept"]
    assert found["quality"]["on_clients"] == expected["quality"]["on_clients"]
    assert found["communication"]["total_bytes"] == expected["communication"]["total_bytes"]


# -- nothing of it where it is off -----------------------------------------------------------


def test_a_run_without_it_says_nothing_of_it(experiment: Make) -> None:
    settled = replace(experiment(strategy_num_rounds=1))
    prepared = prepare(settled, Silent())
    assert prepared.plan.evaluation is None
    assert b"evaluation" not in prepared.plan._header()
    result = federate(
        LocalGrid.of(NodeConfig.from_experiment(settled), 1),
        prepared,
        new_run_folder(settled),
        Silent(),
    )
    assert "on_clients" not in result["quality"]
    assert "kept" not in result["run"]
    assert "by_kind" not in result["communication"]
    lines = (Path(settled.run.out) / "rounds.jsonl").read_text()
    assert "on_clients" not in lines
    assert "client_evaluation_seconds" not in lines
