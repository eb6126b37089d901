"""Laws of a whole run: same seed, same bytes; plain at the end; Flower's FedAvg at density 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from in_process_run import run

from fedpet.backbone.pretrained import load_backbone
from fedpet.client.node import Node
from fedpet.client.node_config import NodeConfig
from fedpet.codec import decode_values
from fedpet.pet.layout import quantisation_groups
from fedpet.protocol.frame import Frame, pack_frame, unpack_frames
from fedpet.protocol.plan import Plan
from fedpet.protocol.request import read_request, to_record
from fedpet.run.local_grid import LocalGrid
from fedpet.utils.seeds import derive_seed

# -- law 6: same seed, same bytes ------------------------------------------------------------


def test_the_spread_of_clients_over_nodes_does_not_change_the_result(experiment: Any) -> None:
    hashes = {run(experiment(), nodes=nodes)["final_values_sha256"] for nodes in (1, 2, 5)}
    assert len(hashes) == 1


def test_the_order_of_replies_does_not_change_the_result(experiment: Any) -> None:
    class Reversed(LocalGrid):
        def pull_messages(self, message_ids: Any) -> Any:
            return list(super().pull_messages(message_ids))[::-1]

    settings = experiment()
    reverse = Reversed({n: Node(NodeConfig.from_experiment(settings)).answer for n in (1, 2, 3)})
    assert (
        run(settings, reverse)["final_values_sha256"]
        == run(experiment(), nodes=3)["final_values_sha256"]
    )


def test_a_wire_that_remembers_gives_the_same_on_any_nodes_and_leaves_nothing_behind(
    experiment: Any,
) -> None:
    lossy = {
        "codec_uplink": "topk-0.1+eden-4",
        "codec_head_uplink": "int8",
        "codec_downlink": "eden-2",
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

    from fedpet.backbone.pretrained import locate
    from fedpet.data import load_data
    from fedpet.training.evaluation import assess_rows

    settings = experiment()
    result = run(settings)
    saved = AutoModelForSequenceClassification.from_pretrained(Path(settings.run.out) / "model")
    data = load_data(
        settings.data,
        settings.clients,
        locate(settings.backbone),
        cache=Path(settings.run.cache),
    )
    assert assess_rows(saved, data.evaluation, data.task).value == result["quality"]["final"]


# -- law 4: it is Flower's FedAvg ------------------------------------------------------------


def test_with_every_linear_in_scope_and_density_1_the_result_is_flower_s_fedavg(
    experiment: Any,
) -> None:
    settings = experiment(
        mask_density=1.0, structure_preset="none", strategy_num_rounds=1, run_seed=3
    )
    kept: list[Frame] = []
    node = Node(NodeConfig.from_experiment(settings))

    def listen(payload: bytes) -> bytes:
        answer = node.answer(payload)
        kept.extend(unpack_frames(answer, max_frames=9, max_payload_bytes=len(answer)))
        return answer

    run(settings, LocalGrid({1: listen}))
    plan = Plan.from_bytes((Path(settings.run.out) / "plan.bin").read_bytes())
    pet = plan.build(load_backbone(settings.backbone, num_outputs=2))
    groups = quantisation_groups(pet.segments)
    replies = []
    request = Message(to_record(b""), dst_node_id=1, message_type="train")
    for frame in kept:  # each client's whole model, as a Flower user would send it
        seed = derive_seed("encode", derive_seed("client", plan.seed, 1, frame.client))
        update = decode_values(frame.payload, frame.codec, groups, seed=seed)
        pet.set_delta(torch.from_numpy(update.copy()), seed=0)
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
    pet.set_delta(torch.from_numpy(values), seed=0)
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
