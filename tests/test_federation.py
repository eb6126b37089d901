"""Laws of a whole run, on nodes in this process: real model, real strategy, real frames."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from tiny import Silent

from fedpet.backbone import load_backbone
from fedpet.client import Node, Resident
from fedpet.codec import decode_values
from fedpet.codec.frame import Frame, pack_frame, unpack_frames
from fedpet.config import Experiment
from fedpet.errors import RunError
from fedpet.layout import groups_by_kind
from fedpet.ledger import Ledger
from fedpet.messages import from_record, read_request, to_record
from fedpet.node_settings import NodeSettings
from fedpet.plan import Plan
from fedpet.seeds import client_number, derive_seed
from fedpet.simulations.federation import federate, prepare
from fedpet.simulations.local_grid import LocalGrid
from fedpet.simulations.run_folder import RunFolder, new_run_folder
from fedpet.training import Trained

Handler = Callable[[bytes], bytes]


def run(experiment: Experiment, grid: LocalGrid | None = None, nodes: int = 1) -> dict[str, Any]:
    grid = grid or LocalGrid.of(NodeSettings.of(experiment), nodes)
    return federate(grid, prepare(experiment, Silent()), new_run_folder(experiment), Silent())


# -- law 6: same seed, same bytes ------------------------------------------------------------


def test_the_spread_of_clients_over_nodes_does_not_change_the_result(experiment: Any) -> None:
    hashes = {run(experiment(), nodes=nodes)["final_values_sha256"] for nodes in (1, 2, 5)}
    assert len(hashes) == 1


def test_the_order_of_replies_does_not_change_the_result(experiment: Any) -> None:
    class Reversed(LocalGrid):
        def pull_messages(self, message_ids: Any) -> Any:
            return list(super().pull_messages(message_ids))[::-1]

    settings = experiment()
    reverse = Reversed({n: Node(NodeSettings.of(settings)).answer for n in (1, 2, 3)})
    assert (
        run(settings, reverse)["final_values_sha256"]
        == run(experiment(), nodes=3)["final_values_sha256"]
    )


def test_a_wire_that_remembers_gives_the_same_on_any_nodes_and_leaves_nothing_behind(
    experiment: Any,
) -> None:
    lossy = {
        "codec_up": "topk-0.1+eden-4",
        "codec_head_up": "int8",
        "codec_down": "eden-2",
        "codec_error_feedback": True,
    }
    settings = [experiment(**lossy) for _ in range(2)]
    first, second = (run(s, nodes=n) for s, n in zip(settings, (1, 3), strict=True))
    assert first["final_values_sha256"] == second["final_values_sha256"]
    assert first["refused"] == second["refused"] == []
    for s in settings:
        assert not list((Path(s.run.cache) / "state").glob("*/*"))


def test_another_seed_gives_another_result(experiment: Any) -> None:
    assert (
        run(experiment(run_seed=1))["final_values_sha256"]
        != run(experiment())["final_values_sha256"]
    )


# -- law 1 and 2: plain at the end, untouched means untouched --------------------------------


def test_the_saved_model_is_plain_and_only_what_the_plan_names_has_moved(
    experiment: Any, files: tuple[Path, Path]
) -> None:
    from transformers import AutoModelForSequenceClassification

    settings = experiment(structure_preset="bitfit", mask_density=0.02)
    result = run(settings)
    saved = AutoModelForSequenceClassification.from_pretrained(Path(settings.run.out) / "model")
    backbone = load_backbone(settings.backbone, num_outputs=2)
    plan = Plan.from_bytes((Path(settings.run.out) / "plan.bin").read_bytes())
    start = {name: p.clone() for name, p in backbone.model.state_dict().items()}
    pet = plan.build(backbone)
    assert type(saved) is type(backbone.model)
    assert {n: p.shape for n, p in saved.state_dict().items()} == {
        n: p.shape for n, p in start.items()
    }
    moved = 0
    for name, tensor in saved.state_dict().items():
        changed = int((tensor != start[name]).sum())
        named = sum(
            s.size
            for s in pet.segments
            if s.name == name or (s.kind == "bitfit" and f"{s.name}.bias" == name)
        )
        assert changed <= named, name
        moved += changed
    assert 0.8 * result["model"]["communicated_values"] < moved


def test_the_reported_metric_is_that_of_the_saved_model(experiment: Any) -> None:
    from transformers import AutoModelForSequenceClassification

    from fedpet.backbone import locate
    from fedpet.data import load_data
    from fedpet.training import evaluate

    settings = experiment()
    result = run(settings)
    saved = AutoModelForSequenceClassification.from_pretrained(Path(settings.run.out) / "model")
    data = load_data(
        settings.data,
        settings.population,
        locate(settings.backbone),
        cache=Path(settings.run.cache),
    )
    assert evaluate(saved, data.evaluation, data.task) == result["quality"]["final"]


# -- law 4: it is Flower's FedAvg ------------------------------------------------------------


def test_with_every_linear_in_scope_and_density_1_the_result_is_flower_s_fedavg(
    experiment: Any,
) -> None:
    settings = experiment(
        mask_density=1.0, structure_preset="none", strategy_num_rounds=1, run_seed=3
    )
    kept: list[Frame] = []
    node = Node(NodeSettings.of(settings))

    def listen(payload: bytes) -> bytes:
        answer = node.answer(payload)
        kept.extend(unpack_frames(answer, max_frames=9, max_payload_bytes=len(answer)))
        return answer

    run(settings, LocalGrid({1: listen}))
    plan = Plan.from_bytes((Path(settings.run.out) / "plan.bin").read_bytes())
    pet = plan.build(load_backbone(settings.backbone, num_outputs=2))
    groups = groups_by_kind(pet.segments)
    replies = []
    request = Message(to_record(b""), dst_node_id=1, message_type="train")
    for frame in kept:  # each client's whole model, as a Flower user would send it
        seed = derive_seed("encode", derive_seed("client", plan.seed, 1, frame.client))
        update = decode_values(frame.payload, frame.codec, groups, seed=seed)
        pet.load_values(torch.from_numpy(update.copy()), seed=0)
        content = RecordDict(
            {
                "arrays": ArrayRecord(pet.merged().state_dict()),
                "metrics": MetricRecord({"num-examples": frame.num_examples}),
            }
        )
        replies.append(Message(content, reply_to=request))
    expected, _ = FedAvg(min_available_nodes=1).aggregate_train(1, replies)
    assert expected is not None
    values = np.load(Path(settings.run.out) / "checkpoint" / "values.npy")
    pet.load_values(torch.from_numpy(values), seed=0)
    for name, tensor in pet.merged().state_dict().items():
        difference = np.abs(tensor.numpy() - expected[name].numpy()).max()
        assert difference < 1e-6, (name, difference)


def test_the_mean_of_three_updates_is_weighted_by_their_rows(experiment: Any) -> None:
    """The federation's case of the shared mask: weights as 10, 30, 60, computed by hand."""
    deltas = [[0.1, -0.2, 0.05, 0.0], [0.0, 0.1, -0.05, 0.2], [-0.1, 0.0, 0.1, 0.1]]
    rows = [1, 3, 6]
    settings = experiment(
        strategy_num_rounds=1,
        strategy_clients_per_round=3,
        structure_preset="none",
    )

    def answer(payload: bytes) -> bytes:
        request = read_request(payload)
        asked = next(unpack_frames(request.frame, max_frames=1, max_payload_bytes=1 << 20))
        assert isinstance(asked, Frame)
        frames = []
        for client, delta, examples in zip(request.clients, deltas, rows, strict=True):
            update = np.zeros(asked.count, dtype=np.float32)
            update[:4] = delta
            frames.append(pack_frame(_frame(asked, client, update, examples)))
        return b"".join(frames)

    run(settings, LocalGrid({1: answer}))
    values = np.load(Path(settings.run.out) / "checkpoint" / "values.npy")
    # In the order of the clients' names, which is that of the request.
    assert values[:4] == pytest.approx([-0.05, 0.01, 0.05, 0.12], abs=1e-7)
    assert not values[4:].any()


def _frame(asked: Frame, client: int, update: np.ndarray, examples: int = 4) -> Frame:
    from fedpet.codec import encode_values

    return Frame(
        plan_digest=asked.plan_digest,
        server_round=asked.server_round,
        client=client,
        codec=asked.codec,
        count=asked.count,
        num_examples=examples,
        loss=0.5,
        train_seconds=0.1,
        payload=encode_values(update, asked.codec, [(0, asked.count)], seed=0),
    )


def test_the_books_have_every_message_by_node_kind_and_direction(experiment: Any) -> None:
    settings = experiment(strategy_num_rounds=2)
    result = run(settings, nodes=3)
    lines = [
        json.loads(line)
        for line in (Path(settings.run.out) / "rounds.jsonl").read_text().splitlines()
    ]
    for line in lines:
        counted = line["wire_by_node"]
        assert sum(sum(each.values()) for each in counted.values()) == line["wire_bytes"]
        assert all(set(each) >= {"train down", "train up"} for each in counted.values())
    books = result["communication"]
    assert sum(line["wire_bytes"] for line in lines) == books["wire_bytes"]
    assert sum(books["wire_by_kind"].values()) == books["wire_bytes"]
    assert set(books["wire_by_kind"]) == {"plan down", "train down", "train up"}
    # The plan goes to each node once, and is counted as long as it is.
    plan = (Path(settings.run.out) / "plan.bin").stat().st_size
    assert books["wire_by_kind"]["plan down"] == 3 * plan
    assert {node for line in lines for node in line["wire_by_node"]} == {"1", "2", "3"}


# -- law 7: a wrong reply never becomes part of the average ----------------------------------


def spoil(node: Handler, change: Callable[[Frame], bytes], victim: int) -> Handler:
    """A node whose answer for one client is changed on its way."""

    def answer(payload: bytes) -> bytes:
        out = []
        whole = node(payload)
        for frame in unpack_frames(whole, max_frames=99, max_payload_bytes=len(whole)):
            assert isinstance(frame, Frame)
            out.append(change(frame) if frame.client == victim else pack_frame(frame))
        return b"".join(out)

    return answer


WRONG = {
    "plan": lambda f: pack_frame(replace(f, plan_digest=b"\1" * 16)),
    "round": lambda f: pack_frame(replace(f, server_round=f.server_round + 1)),
    "values by": lambda f: pack_frame(replace(f, count=f.count - 1)),
    "at least 1 example": lambda f: pack_frame(replace(f, num_examples=0)),
    "at most the client's": lambda f: pack_frame(replace(f, num_examples=10**9)),
    "second frame": lambda f: pack_frame(f) * 2,
}


@pytest.mark.parametrize("word", WRONG)
def test_a_wrong_frame_is_refused_by_name_and_the_round_goes_on(experiment: Any, word: str) -> None:
    settings = experiment(strategy_num_rounds=1, strategy_clients_per_round=6)
    victim = client_number("client 2")
    honest = Node(NodeSettings.of(settings)).answer
    change: Callable[[Frame], bytes] = WRONG[word]
    result = run(settings, LocalGrid({1: spoil(honest, change, victim)}))
    [refused] = result["refused"]
    assert refused["who"] == "client 2"
    assert word in refused["reason"]
    if word != "second frame":  # of a duplicate the first is kept; else the others are averaged
        without = experiment(strategy_num_rounds=1, strategy_clients_per_round=6)
        silent = spoil(Node(NodeSettings.of(without)).answer, lambda f: b"", victim)
        assert (
            run(without, LocalGrid({1: silent}))["final_values_sha256"]
            == (result["final_values_sha256"])
        )


def test_a_client_whose_training_gives_nan_is_refused_by_name(
    experiment: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _poison(monkeypatch, lambda client: client == client_number("client 3"))
    result = run(experiment(strategy_num_rounds=1, strategy_clients_per_round=6))
    assert [r["who"] for r in result["refused"]] == ["client 3"]
    assert "NaN" in result["refused"][0]["reason"]
    assert result["run"]["status"] == "ok"


def test_a_run_in_which_every_client_gives_nan_fails(
    experiment: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _poison(monkeypatch, lambda client: True)
    settings = experiment(strategy_num_rounds=2)
    with pytest.raises(RunError, match="nothing was learned"):
        run(settings)
    lines = (Path(settings.run.out) / "rounds.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["refused"]) for line in lines] == [0, 4, 4]


def _poison(monkeypatch: pytest.MonkeyPatch, whom: Callable[[int], bool]) -> None:
    """Make the values of some clients NaN after their training, as a diverged step does."""
    from fedpet import client as client_module

    honest = client_module._moved

    def diverged(resident: Resident, client: int, *args: Any) -> Trained:
        trained = honest(resident, client, *args)
        if whom(client):
            nan = torch.full((resident.pet.num_values,), math.nan)
            resident.pet.load_values(nan, seed=0)
        return trained

    monkeypatch.setattr(client_module, "_moved", diverged)


def test_a_node_that_raises_or_talks_nonsense_does_not_end_the_run(experiment: Any) -> None:
    def broken(payload: bytes) -> bytes:
        raise MemoryError("no room")

    settings = experiment(strategy_num_rounds=1, strategy_clients_per_round=6, strategy_quorum=0.3)
    honest = Node(NodeSettings.of(settings)).answer
    grid = LocalGrid({1: honest, 2: broken, 3: lambda payload: b"\x80\x04nonsense"})
    result = run(settings, grid)
    reasons = {r["who"]: r["reason"] for r in result["refused"]}
    assert sorted(reasons) == ["client 1", "client 2", "client 4", "client 5"]
    assert sum("no room" in reason for reason in reasons.values()) == 2
    assert result["run"]["status"] == "ok"


def test_a_round_below_its_quorum_leaves_the_values_alone(experiment: Any) -> None:
    settings = experiment(strategy_num_rounds=1, strategy_quorum=0.9)
    honest = Node(NodeSettings.of(settings)).answer

    def broken(payload: bytes) -> bytes:
        raise MemoryError("no room")

    with pytest.raises(RunError, match="quorum"):
        run(settings, LocalGrid({1: honest, 2: broken}))
    assert not np.load(Path(settings.run.out) / "checkpoint" / "values.npy").any()


# -- the plan --------------------------------------------------------------------------------


def test_the_plan_travels_once_to_a_node_and_again_when_the_node_has_lost_it(
    experiment: Any,
) -> None:
    settings = experiment(strategy_num_rounds=3, run_workers=1)
    seen: list[int] = []
    plans = Path(settings.run.cache) / "plans"
    node = [Node(NodeSettings.of(settings))]

    def forgetful(payload: bytes) -> bytes:
        request = read_request(payload)
        seen.append(len(request.plan))
        if len(seen) == 2:  # the device is wiped between two rounds
            for file in plans.iterdir():
                file.unlink()
            node[0] = Node(NodeSettings.of(settings))
        return node[0].answer(payload)

    result = run(settings, LocalGrid({1: forgetful}))
    assert [bool(size) for size in seen] == [True, False, True, False]
    assert result["refused"] == []
    assert result["final_values_sha256"] == run(experiment())["final_values_sha256"]


@pytest.mark.parametrize("damage", [lambda whole: b"", lambda whole: whole[:-3], lambda w: w * 2])
def test_a_plan_that_was_damaged_on_the_device_s_disk_is_sent_again(
    experiment: Any, damage: Callable[[bytes], bytes]
) -> None:
    settings = experiment(strategy_num_rounds=2)
    seen: list[int] = []

    def device(payload: bytes) -> bytes:
        seen.append(len(read_request(payload).plan))
        if len(seen) == 2:  # it lost power while the plan was written
            [plan] = (Path(settings.run.cache) / "plans").iterdir()
            plan.write_bytes(damage(plan.read_bytes()))
        return Node(NodeSettings.of(settings)).answer(payload)

    assert run(settings, LocalGrid({1: device}))["refused"] == []
    assert [bool(size) for size in seen] == [True, False, True]


def test_plans_that_nothing_asked_for_in_months_are_removed(experiment: Any) -> None:
    settings = experiment(strategy_num_rounds=1)
    plans = Path(settings.run.cache) / "plans"
    plans.mkdir(parents=True, exist_ok=True)
    for name, age in (("old.plan", 100), ("recent.plan", 10)):
        (plans / name).write_bytes(b"")
        os.utime(plans / name, (time.time() - age * 86400,) * 2)
    run(settings)
    assert {path.name for path in plans.iterdir()} >= {"recent.plan"}
    assert not (plans / "old.plan").exists()


def test_books_that_the_disk_does_not_take_end_the_run_with_one_sentence(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)  # a folder, where a file should be
    ledger.begin(0)
    with pytest.raises(RunError, match=r"cannot be written: .* Make room"):
        ledger.close()
    with pytest.raises(RunError, match=r"result\.json' cannot be written: .* Make room"):
        RunFolder(tmp_path / "gone").write_result({})


def test_a_client_with_another_checkpoint_is_refused_with_both_fingerprints(
    experiment: Any, tmp_path: Path
) -> None:
    other = tiny.make_backbone(tmp_path / "other", seed=1)
    settings = experiment(strategy_num_rounds=1, strategy_clients_per_round=6)
    strange = replace(
        NodeSettings.of(settings), backbone=replace(settings.backbone, model=str(other))
    )
    nodes = {1: Node(NodeSettings.of(settings)).answer, 2: Node(strange).answer}
    result = run(settings, LocalGrid(nodes))
    theirs = load_backbone(strange.backbone, num_outputs=2).fingerprint
    assert result["refused"]
    for refused in result["refused"]:
        assert theirs[:16] in refused["reason"]
        assert result["run"]["fingerprint"][:16] in refused["reason"]


def test_a_run_with_no_node_says_so_and_ends(experiment: Any) -> None:
    with pytest.raises(RunError, match=r"no node came within 0\.1 seconds"):
        run(experiment(strategy_node_wait_seconds=0.1), LocalGrid({}))


# -- the books -------------------------------------------------------------------------------


def test_the_bytes_of_a_run_with_one_client_a_node_are_those_on_the_wire(experiment: Any) -> None:
    settings = experiment(strategy_num_rounds=1, strategy_clients_per_round=6)
    result = run(settings, nodes=6)["communication"]
    # The ids in a message's metadata are shorter here than between machines.
    assert result["total_bytes"] == pytest.approx(result["wire_bytes"], rel=0.02)
    assert result["messages"] == 12


def test_what_is_counted_does_not_depend_on_the_spread_over_nodes(experiment: Any) -> None:
    def books(nodes: int) -> dict[str, Any]:
        books: dict[str, Any] = run(experiment(), nodes=nodes)["communication"]
        return {k: v for k, v in books.items() if not k.startswith(("wire_", "messages"))}

    first, second = books(1), books(4)
    # Only the seconds in a frame differ from run to run, and they have a fixed width.
    assert first == second


def test_a_request_survives_its_bytes_and_its_record(experiment: Any) -> None:
    record = to_record(b"some bytes")
    assert from_record(record) == b"some bytes"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
