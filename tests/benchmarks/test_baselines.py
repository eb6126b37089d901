"""The baselines train what they say on what fedpet trains on, and are metered alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from baseline_runs import BaselineGrid, run
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.message import make_message
from flwr.serverapp.strategy import FedAvg
from tiny import Silent

from benchmarks import baselines
from benchmarks.baselines import METHODS, Baseline, DenseFedAvg, DenseLedger
from fedpet.backbone.pretrained import load_backbone, locate
from fedpet.client.node_config import NodeConfig, cache_folder
from fedpet.config import Experiment
from fedpet.data import FederatedData, load_data
from fedpet.errors import ConfigError, RunError, TrainingError
from fedpet.protocol.request import flower_bytes, single_client_bytes, to_record, wire_bytes
from fedpet.run.federate import federate, prepare
from fedpet.run.local_grid import LocalGrid
from fedpet.run.run_folder import new_run_folder
from fedpet.server.client_pool import ClientPool

HIDDEN, LAYERS, OUTPUTS = 32, 2, 2


@pytest.fixture
def data(experiment: Any) -> FederatedData:
    settings = experiment()
    return load_data(
        settings.data,
        settings.clients,
        locate(settings.backbone),
        cache=cache_folder(settings),
    )


def run_fedpet(settings: Experiment) -> dict[str, Any]:
    grid = LocalGrid.of(NodeConfig.from_experiment(settings), 2)
    return federate(grid, prepare(settings, Silent()), new_run_folder(settings), Silent())


# -- what is trained ---------------------------------------------------------------------------


def test_full_fine_tuning_trains_every_parameter(experiment: Any, data: FederatedData) -> None:
    settings = experiment()
    backbone = load_backbone(settings.backbone, num_outputs=2)
    baseline = Baseline("full", settings, data)
    assert set(baseline.tensors) == {name for name, _ in backbone.model.named_parameters()}
    assert set(baseline.groups["head"]) == set(backbone.head)


def test_head_only_trains_the_classifier_alone(experiment: Any, data: FederatedData) -> None:
    baseline = Baseline("head", experiment(), data)
    assert list(baseline.tensors) == ["classifier.weight", "classifier.bias"]
    assert baseline.values_by_kind() == {"head": OUTPUTS * HIDDEN + OUTPUTS}


def test_peft_lora_trains_factors_of_rank_8_at_query_and_value_and_the_head(
    experiment: Any, data: FederatedData
) -> None:
    baseline = Baseline("peft-lora", experiment(), data)
    shapes = {name: tuple(tensor.shape) for name, tensor in baseline.groups["lora"].items()}
    assert len(shapes) == LAYERS * 2 * 2  # query and value, A and B
    assert all(".query." in name or ".value." in name for name in shapes)
    assert set(shapes.values()) == {(8, HIDDEN), (HIDDEN, 8)}
    assert baseline.values_by_kind() == {
        "lora": LAYERS * 2 * 2 * 8 * HIDDEN,
        "head": OUTPUTS * HIDDEN + OUTPUTS,
    }
    scales = {m.scaling["default"] for m in baseline.model.modules() if hasattr(m, "lora_A")}
    assert scales == {2.0}  # alpha 16 over rank 8


def test_whatever_is_not_sent_asks_for_no_gradient(experiment: Any, data: FederatedData) -> None:
    for method in METHODS:
        baseline = Baseline(method, experiment(), data)
        asking = {name for name, p in baseline.model.named_parameters() if p.requires_grad}
        assert asking == set(baseline.tensors), method


def test_all_methods_start_from_the_same_model(experiment: Any, data: FederatedData) -> None:
    settings = experiment()
    batch = data.evaluation.batch(np.arange(8))
    batch.pop("labels")
    with torch.no_grad():
        expected = load_backbone(settings.backbone, num_outputs=2).model(**batch).logits
        for method in METHODS:
            assert torch.equal(Baseline(method, settings, data).model(**batch).logits, expected)


def test_server_and_clients_draw_the_same_lora_factors(
    experiment: Any, data: FederatedData
) -> None:
    first, second = (Baseline("peft-lora", experiment(), data).tensors for _ in range(2))
    other = Baseline("peft-lora", experiment(run_seed=1), data).tensors
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_setting_up_lora_leaves_the_callers_random_numbers_alone(
    experiment: Any, data: FederatedData
) -> None:
    backbone = load_backbone(experiment().backbone, num_outputs=2)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    METHODS["peft-lora"](backbone, 0)
    assert torch.equal(torch.rand(3), expected)


def test_a_head_of_two_layers_is_trained_whole_by_every_method(
    files: tuple[Path, Path], tmp_path: Path, experiment: Any, data: FederatedData
) -> None:
    from transformers import RobertaConfig, RobertaModel

    folder = shutil.copytree(files[0], tmp_path / "roberta")
    torch.manual_seed(0)
    RobertaModel(
        RobertaConfig(
            vocab_size=64,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
        ),
        add_pooling_layer=False,
    ).save_pretrained(folder)
    settings = experiment(backbone_model=str(folder))
    for method in METHODS:
        names = Baseline(method, settings, data).groups["head"]
        assert len(names) == 4, method
        assert all(".dense." in name or ".out_proj." in name for name in names), method


def test_tensors_written_into_a_model_come_out_with_the_same_bits(
    experiment: Any, data: FederatedData
) -> None:
    baseline = Baseline("full", experiment(), data)
    with torch.no_grad():
        for tensor in baseline.tensors.values():
            tensor.normal_()
    sent = baseline.arrays()
    other = Baseline("full", experiment(), data)
    other.load(sent)
    received = other.arrays()
    assert {name: array.data for name, array in received.items()} == {
        name: array.data for name, array in sent.items()
    }


def test_an_unknown_baseline_is_refused_with_the_known_ones(
    experiment: Any, data: FederatedData
) -> None:
    with pytest.raises(ConfigError, match="full, peft-lora, head"):
        Baseline("prefix", experiment(), data)


# -- the same federation -------------------------------------------------------------------------


def test_a_baseline_trains_the_same_clients_on_the_same_batches_as_fedpet(
    experiment: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedpet.client import train_client

    seen: dict[str, list[tuple[int, tuple[int, ...], float]]] = {}

    def watch(who: str, module: Any) -> None:
        honest = module.train_rows

        def train_rows(*args: Any, seed: int, factor: float, **kwargs: Any) -> Any:
            rows = tuple(int(index) for index in args[3])
            seen.setdefault(who, []).append((seed, rows, factor))
            return honest(*args, seed=seed, factor=factor, **kwargs)

        monkeypatch.setattr(module, "train_rows", train_rows)

    watch("fedpet", train_client)
    watch("head", baselines.client)
    run_fedpet(experiment())
    run("head", experiment())
    assert len(seen["head"]) == 12  # 3 rounds of 4 clients
    assert sorted(seen["head"]) == sorted(seen["fedpet"])


@pytest.mark.parametrize("method", METHODS)
def test_neither_nodes_nor_the_order_of_replies_change_a_baselines_result(
    experiment: Any, method: str
) -> None:
    class InOrder(BaselineGrid):
        def pull_messages(self, message_ids: Any) -> Any:
            return LocalGrid.pull_messages(self, message_ids)

    settings = experiment(strategy_num_rounds=2)
    reversed_on_three = run(method, settings, BaselineGrid(method, settings, nodes=3))
    settings = experiment(strategy_num_rounds=2)
    in_order_on_one = run(method, settings, InOrder(method, settings, nodes=1))
    assert reversed_on_three["final_values_sha256"] == in_order_on_one["final_values_sha256"]
    assert reversed_on_three["quality"] == in_order_on_one["quality"]


def test_full_fine_tuning_learns_and_its_metric_is_that_of_the_last_round(experiment: Any) -> None:
    settings = experiment(strategy_num_rounds=6)
    result = run("full", settings)
    assert result["quality"]["final"] > result["quality"]["before"]
    assert result["quality"]["final"] == result["quality"]["by_round"][-1]["value"]
    assert {path.name for path in Path(settings.run.out).iterdir()} == {
        "config.toml",
        "rounds.jsonl",
        "result.json",
    }
    assert Experiment.from_file(Path(settings.run.out) / "config.toml") == settings


def test_a_baselines_result_has_the_keys_of_fedpets(experiment: Any) -> None:
    ours = run_fedpet(experiment(strategy_num_rounds=1))
    theirs = run("head", experiment(strategy_num_rounds=1))
    assert list(ours) == list(theirs)
    for part in ours:
        if isinstance(ours[part], dict):
            assert list(ours[part]) == list(theirs[part]), part
    assert theirs["run"]["method"] == "head"
    assert ours["run"]["fingerprint"] == theirs["run"]["fingerprint"]
    assert ours["data"] == theirs["data"]


def test_only_due_rounds_are_evaluated(experiment: Any) -> None:
    result = run("head", experiment(strategy_num_rounds=3, strategy_evaluate_every=3))
    assert [entry["round"] for entry in result["quality"]["by_round"]] == [0, 3]


def test_a_baseline_under_another_strategy_than_fedavg_is_refused() -> None:
    settings = Experiment.from_tables({"strategy": {"name": "krum"}})
    with pytest.raises(ConfigError, match=r"Flower's FedAvg, and strategy\.name is 'krum'"):
        baselines.prepare_baseline("head", settings, Silent())


def test_a_client_that_fails_is_refused_by_name_and_the_round_goes_on(
    experiment: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = baselines.client._train

    def train(content: RecordDict, client: str, *args: Any) -> RecordDict:
        if client == "client 3":
            raise TrainingError("the training loss became nan after 8 rows.")
        return honest(content, client, *args)

    monkeypatch.setattr(baselines.client, "_train", train)
    result = run("head", experiment(strategy_num_rounds=1, strategy_clients_per_round=6))
    assert [refused["who"] for refused in result["refused"]] == ["client 3"]
    assert "nan" in result["refused"][0]["reason"]
    assert result["run"]["status"] == "ok"


def test_a_run_in_which_every_client_diverges_fails_and_leaves_its_result(experiment: Any) -> None:
    settings = experiment(
        training_learning_rate=1e30, training_clip_norm=0.0, strategy_num_rounds=1
    )
    with pytest.raises(RunError, match="nothing was learned"):
        run("full", settings)
    result = json.loads((Path(settings.run.out) / "result.json").read_text())
    assert result["run"]["status"] == "nothing learned"
    assert len(result["refused"]) == 4


# -- the average and the bytes -------------------------------------------------------------------


def _strategy(settings: Experiment, ledger: DenseLedger) -> DenseFedAvg:
    population = ClientPool({f"client {n}": 5 + n for n in range(6)}, homes={})
    return DenseFedAvg(settings, population, ledger)


class _Recorder(LocalGrid):
    """Answers each client with its own random tensors."""

    def _answer(self, message: Message) -> Message:
        client = str(message.content.config_records["config"]["client"])
        generator = np.random.default_rng(int(client.split()[-1]))
        arrays = {
            name: Array(generator.normal(size=array.shape).astype(np.float32))
            for name, array in message.content.array_records["arrays"].items()
        }
        weight = int(generator.integers(1, 30))
        metrics = {"num-examples": weight, "train-loss": 0.5, "train-seconds": 1.0}
        content = {"arrays": ArrayRecord(arrays), "metrics": MetricRecord(metrics)}
        return Message(RecordDict(content), reply_to=message)


def _one_round(settings: Experiment, ledger: DenseLedger) -> tuple[list, list, ArrayRecord]:
    strategy = _strategy(settings, ledger)
    generator = np.random.default_rng(0)
    tensors = {"a": generator.normal(size=(7, 3)), "b": np.zeros(4)}
    start = ArrayRecord({name: Array(v.astype(np.float32)) for name, v in tensors.items()})
    grid = _Recorder({1: bytes, 2: bytes})
    messages = list(strategy.configure_train(1, start, ConfigRecord(), grid))
    replies = list(grid.send_and_receive(messages))
    kept = [make_message(r.metadata, RecordDict(dict(r.content))) for r in replies]
    averaged, _ = strategy.aggregate_train(1, replies[::-1])
    assert averaged is not None
    return messages, kept, averaged


def test_the_average_is_flowers_fedavg_of_the_same_replies_to_the_bit(experiment: Any) -> None:
    ledger = DenseLedger()
    messages, replies, averaged = _one_round(experiment(), ledger)
    clients = {m.metadata.message_id: m.content["config"]["client"] for m in messages}
    by_name = sorted(replies, key=lambda r: clients[r.metadata.reply_to_message_id])
    expected, _ = FedAvg().aggregate_train(1, by_name)
    assert expected is not None
    for name in expected:
        assert averaged[name].numpy().dtype == np.float32
        assert averaged[name].data == expected[name].data


def test_the_wire_count_is_that_of_every_message_serialised_whole(experiment: Any) -> None:
    ledger = DenseLedger()
    messages, replies, _ = _one_round(experiment(), ledger)
    whole = sum(wire_bytes(message) for message in (*messages, *replies))
    assert ledger.current.wire_bytes == whole
    assert ledger.current.messages == 8


def test_each_client_alone_is_charged_its_own_serialised_message(experiment: Any) -> None:
    ledger = DenseLedger()
    messages, replies, _ = _one_round(experiment(), ledger)

    def alone(message: Message, is_reply: bool) -> int:
        envelope = single_client_bytes(0, reply=is_reply) - flower_bytes(to_record(b""))
        return envelope + flower_bytes(message.content)

    assert ledger.current.downlink_bytes == sum(alone(m, False) for m in messages)
    assert ledger.current.uplink_bytes == sum(alone(r, True) for r in replies)
    assert ledger.current.plan_bytes == 0


def test_weighing_leaves_nothing_in_the_arrays_that_are_sent(experiment: Any) -> None:
    messages, _, _ = _one_round(experiment(), DenseLedger())
    for message in messages:
        for array in message.content["arrays"].values():
            assert "_chunks" not in vars(array)  # views of all its bytes


def test_a_rounds_replies_are_let_go_once_they_are_averaged(experiment: Any) -> None:
    strategy = _strategy(experiment(), DenseLedger())
    grid = _Recorder({1: bytes})
    start = ArrayRecord({"a": Array(np.zeros(4, np.float32))})
    replies = grid.send_and_receive(strategy.configure_train(1, start, ConfigRecord(), grid))
    strategy.aggregate_train(1, replies)
    assert all(not reply.content for reply in replies)


def test_uplink_bytes_are_four_a_value_and_a_little_framing(experiment: Any) -> None:
    result = run("full", experiment(strategy_num_rounds=1))
    values = result["model"]["communicated_values"]
    up = result["communication"]["uplink_bytes_per_client_round"]
    tensors = len(list(load_backbone(experiment().backbone, num_outputs=2).model.parameters()))
    assert 4 * values < up < 4 * values + 800 * tensors
    assert result["communication"]["plan_bytes"] == 0


def test_a_baseline_wants_a_number_for_its_rate(experiment: Any) -> None:
    with pytest.raises(ConfigError, match="a baseline has another: give a number"):
        run("head", experiment(training_learning_rate="auto"))
