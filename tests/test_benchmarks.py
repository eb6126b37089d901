"""The baselines train what they say on what fedpet trains on; the table is resumed, never bent."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tomli_w
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.message import make_message
from flwr.serverapp.strategy import FedAvg
from report_runs import make_result, to_text
from tiny import Silent

from fedpet.backbone import load_backbone, locate
from fedpet.config import Experiment
from fedpet.data import FederatedData, load_data
from fedpet.errors import ConfigError, RunError, TrainingError
from fedpet.messages import solo_bytes, to_record, wire_bytes
from fedpet.node_settings import NodeSettings, cache_folder
from fedpet.population import Population
from fedpet.simulations.federation import federate, prepare
from fedpet.simulations.local_grid import LocalGrid
from fedpet.simulations.run_folder import new_run_folder

REPOSITORY = Path(__file__).resolve().parents[1]
# Benchmarks are in no wheel: they are taken from the checkout. At the end of the path, so that a
# wheel's fedpet stays the one that is tested.
sys.path.append(str(REPOSITORY))

from simulations.benchmarks import baselines, table  # noqa: E402
from simulations.benchmarks.__main__ import main, tuning_table  # noqa: E402
from simulations.benchmarks.baselines import METHODS, Baseline, DenseFedAvg, DenseLedger  # noqa: E402
from simulations.benchmarks.table import Cell, Rate, TableFile, TableRun, read_cell  # noqa: E402

HIDDEN, LAYERS, OUTPUTS = 32, 2, 2


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    rows = tiny.make_rows(folder / "rows")
    shutil.copy(rows / "test.jsonl", rows / "validation.jsonl")
    return tiny.make_backbone(folder / "backbone"), rows


@pytest.fixture
def data(experiment: Any) -> FederatedData:
    settings = experiment()
    return load_data(
        settings.data,
        settings.population,
        locate(settings.backbone),
        cache=cache_folder(settings),
    )


class BaselineGrid(LocalGrid):
    """Nodes in this process that answer as a baseline's ClientApp does, the last message first."""

    def __init__(self, method: str, settings: Experiment, nodes: int = 2) -> None:
        super().__init__({number: lambda payload: payload for number in range(1, nodes + 1)})
        self.asked: list[tuple[int, str]] = []
        self._method, self._settings = method, settings

    def _answer(self, message: Message) -> Message:
        told = message.content.config_records["config"]
        self.asked.append((int(told["server-round"]), str(told["client"])))
        return baselines.reply(message, self._method, self._settings)

    def pull_messages(self, message_ids: Any) -> Any:
        return list(super().pull_messages(message_ids))[::-1]


def run(method: str, settings: Experiment, grid: LocalGrid | None = None) -> dict[str, Any]:
    grid = grid or BaselineGrid(method, settings)
    prepared = baselines.prepare_baseline(method, settings, Silent())
    return baselines.federate_baseline(grid, prepared, new_run_folder(settings), Silent())


def run_fedpet(settings: Experiment) -> dict[str, Any]:
    grid = LocalGrid.of(NodeSettings.of(settings), 2)
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
    from fedpet import client

    seen: dict[str, list[tuple[int, tuple[int, ...], float]]] = {}

    def watch(who: str, module: Any) -> None:
        honest = module.train_rows

        def train_rows(*args: Any, seed: int, progress: float, **kwargs: Any) -> Any:
            rows = tuple(int(index) for index in args[3])
            seen.setdefault(who, []).append((seed, rows, progress))
            return honest(*args, seed=seed, progress=progress, **kwargs)

        monkeypatch.setattr(module, "train_rows", train_rows)

    watch("fedpet", client)
    watch("head", baselines)
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
    honest = baselines._train

    def train(content: RecordDict, client: str, *args: Any) -> RecordDict:
        if client == "client 3":
            raise TrainingError("the training loss became nan after 8 rows.")
        return honest(content, client, *args)

    monkeypatch.setattr(baselines, "_train", train)
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
    population = Population({f"client {n}": 5 + n for n in range(6)}, homes={})
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
        envelope = solo_bytes(b"", reply=is_reply) - wire_bytes(to_record(b""))
        return envelope + wire_bytes(message.content)

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


# -- the table file ------------------------------------------------------------------------------


@pytest.fixture
def table_file(experiment: Any, tmp_path: Path) -> Callable[..., Path]:
    tables = experiment().to_tables()
    tables["run"]["out"] = ""
    (tmp_path / "tiny.toml").write_text(tomli_w.dumps(tables), encoding="utf-8")

    def write(**changes: Any) -> Path:
        content = {
            "experiment": "tiny.toml",
            "tune": {"split": "validation", "seed": 3},
            "final": {"split": "test", "seeds": [0, 1]},
            "methods": {
                "full": {"learning-rates": [0.001, 0.01]},
                "narrow": {"runs": "fedpet", "learning-rates": [0.01, 0.1], "set": []},
            },
            **changes,
        }
        path = tmp_path / "small.toml"
        path.write_text(tomli_w.dumps(content), encoding="utf-8")
        return path

    return write


class Fake:
    """Stands in for a run: counts them, and gives the metric that `score` says."""

    def __init__(self, score: Callable[[Cell], float] = lambda cell: 0.5) -> None:
        self.ran: list[str] = []
        self.cells: list[Cell] = []
        self._score = score

    def __call__(self, cell: Cell, folder: Path) -> dict[str, Any]:
        self.ran.append(cell.name)
        self.cells.append(cell)
        seed, final = cell.experiment.run.seed, self._score(cell)
        result = make_result(method=cell.method.runs, seed=seed, final=max(final, 0.0))
        if math.isnan(final):
            result["run"]["status"] = "nothing learned"
        return result


def job(path: Path, fake: Fake, **kwargs: Any) -> TableRun:
    return TableRun(TableFile.read(path), lambda line: None, fake, **kwargs)


def test_the_shipped_table_compares_the_three_baselines_and_fedpet_over_equal_grids() -> None:
    shipped = TableFile.read(REPOSITORY / "simulations" / "benchmarks" / "default.toml")
    assert {method.runs for method in shipped.methods} == {*METHODS, "fedpet"}
    assert len({len(method.rates) for method in shipped.methods}) == 1
    assert shipped.final_seeds == (0, 1, 2)
    assert shipped.tune_seed not in shipped.final_seeds
    for method in shipped.methods:
        for cell in shipped.tune_cells(method):
            assert cell.experiment.data.eval_split == "validation"
        for cell in shipped.final_cells(method, method.rates[0]):
            assert cell.experiment.data.eval_split == "test"


def test_grids_of_different_sizes_are_refused_with_the_sizes(table_file: Any) -> None:
    methods = {"full": {"learning-rates": [0.1, 0.2]}, "head": {"learning-rates": [0.1]}}
    with pytest.raises(ConfigError, match=r"grids of the same size.*'full': 2, 'head': 1"):
        TableFile.read(table_file(methods=methods))


def test_tuning_on_the_rows_that_are_reported_is_refused(table_file: Any) -> None:
    with pytest.raises(ConfigError, match="no result is reported on"):
        TableFile.read(table_file(tune={"split": "test", "seed": 3}))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"seeds": [1]}, "unknown key 'seeds'"),
        ({"tune": {"split": "validation"}}, "lacks the key 'seed'"),
        ({"methods": {}}, r"\[methods.NAME\]"),
        ({"methods": {"adapter": {"learning-rates": [1]}}}, "peft-lora"),
        ({"methods": {"full": {"learning-rates": [0]}}}, "learning rates such as 0.001"),
        ({"methods": {"full": {"learning-rates": [True]}}}, "learning rates such as 0.001"),
        ({"methods": {"full": {"learning-rates": ["0.1 head"]}}}, "0.001 head=0.01"),
        ({"methods": {"full": {"learning-rates": [0.1, 0.1]}}}, "distinct"),
        ({"methods": {"full": {"rates": [0.1]}}}, "lacks the key 'learning-rates'"),
        ({"final": {"split": "test", "seeds": ["a"]}}, "whole numbers"),
        ({"experiment": "absent"}, "film-reviews"),
    ],
)
def test_a_wrong_table_file_is_refused_in_one_sentence(
    table_file: Any, changes: dict[str, Any], word: str
) -> None:
    with pytest.raises(ConfigError, match=word):
        TableFile.read(table_file(**changes))


def test_a_rate_may_name_kinds_of_module(table_file: Any) -> None:
    methods = {"full": {"learning-rates": ["0.001 head=0.1", 0.01]}}
    read = TableFile.read(table_file(methods=methods))
    first, second = read.tune_cells(read.methods[0])
    assert first.experiment.training.rate_of("head") == 0.1
    assert first.experiment.training.rate_of("full") == 0.001
    assert second.experiment.training.rate_of("head") == 0.01
    assert first.name == "tune/full-lr0.001-head0.1"


# -- its cells -----------------------------------------------------------------------------------


def test_tuning_runs_every_rate_once_on_the_tuning_split_and_evaluates_at_the_end(
    table_file: Any,
) -> None:
    fake = Fake()
    job(table_file(), fake).tune()
    assert fake.ran == [
        "tune/full-lr0.001",
        "tune/full-lr0.01",
        "tune/narrow-lr0.01",
        "tune/narrow-lr0.1",
    ]
    for cell in fake.cells:
        assert cell.experiment.data.eval_split == "validation"
        assert cell.experiment.strategy.evaluate_every == cell.experiment.strategy.num_rounds
        assert cell.experiment.run.seed == 3


def test_a_second_start_runs_only_what_is_missing(table_file: Any) -> None:
    path = table_file()
    first = Fake()
    job(path, first).tune()
    victim = path.parent / "results" / "small" / "tune" / "narrow-lr0.1.json"
    victim.unlink()
    second = Fake()
    job(path, second).tune()
    assert second.ran == ["tune/narrow-lr0.1"]


def test_a_cell_that_fails_leaves_no_file_and_the_others_stay(table_file: Any) -> None:
    def score(cell: Cell) -> float:
        if cell.name == "tune/full-lr0.01":
            raise RunError("the machine was switched off")
        return 0.5

    path = table_file()
    with pytest.raises(RunError):
        job(path, Fake(score)).tune()
    there = [file.name for file in (path.parent / "results" / "small" / "tune").iterdir()]
    assert there == ["full-lr0.001.json"]


def test_a_cell_run_with_other_settings_is_refused_with_what_differs(table_file: Any) -> None:
    job(table_file(), Fake()).tune()
    again = Fake()
    changed = table_file(set=["training.batch-size=16"])
    with pytest.raises(ConfigError, match=r"training\.batch-size was 4, is 16.*Remove"):
        job(changed, again).tune()
    assert again.ran == []


def test_the_mask_is_a_setting_of_fedpets_cells_and_not_of_a_baselines(table_file: Any) -> None:
    job(table_file(), Fake()).tune()
    changed = table_file(set=["mask.density=0.25"])
    read = TableFile.read(changed)
    full, narrow = read.methods
    assert all(read_cell(cell) is not None for cell in read.tune_cells(full))
    with pytest.raises(ConfigError, match=r"mask\.density was 0\.05, is 0\.25"):
        read_cell(read.tune_cells(narrow)[0])


def test_another_cache_or_number_of_workers_is_no_other_setting(table_file: Any) -> None:
    job(table_file(), Fake()).tune()
    again = Fake()
    job(table_file(set=["run.workers=7", "run.cache=elsewhere"]), again).tune()
    assert again.ran == []


def test_a_key_that_a_stored_cell_did_not_know_had_its_default(table_file: Any) -> None:
    path = table_file()
    job(path, Fake()).tune()
    file = path.parent / "results" / "small" / "tune" / "full-lr0.001.json"
    content = json.loads(file.read_text())
    default = Experiment().training.weight_decay
    assert content["settings"]["training"].pop("weight-decay") == default
    file.write_text(json.dumps(content))
    again = Fake()
    job(path, again).tune()
    assert again.ran == []
    with pytest.raises(ConfigError, match="weight-decay"):
        job(table_file(set=["training.weight-decay=0.1"]), again).tune()


def test_a_file_that_is_no_cell_is_refused(table_file: Any) -> None:
    path = table_file()
    file = path.parent / "results" / "small" / "tune" / "full-lr0.001.json"
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    with pytest.raises(ConfigError, match="no cell of a table"):
        job(path, Fake()).tune()


def test_the_final_runs_take_the_best_rate_and_of_equals_the_smaller(table_file: Any) -> None:
    scores = {"full-lr0.001": 0.7, "full-lr0.01": 0.7, "narrow-lr0.01": 0.6, "narrow-lr0.1": 0.8}
    fake = Fake(lambda cell: scores.get(cell.path.stem, 0.5))
    whole = job(table_file(), fake)
    whole.tune()
    whole.final()
    finals = [cell for cell in fake.cells if cell.name.startswith("final/")]
    assert [cell.name for cell in finals] == [
        "final/full-seed0",
        "final/full-seed1",
        "final/narrow-seed0",
        "final/narrow-seed1",
    ]
    assert {cell.experiment.data.eval_split for cell in finals} == {"test"}
    assert [cell.experiment.run.seed for cell in finals] == [0, 1, 0, 1]
    assert [cell.experiment.training.learning_rate for cell in finals] == [0.001] * 2 + [0.1] * 2
    assert finals[0].experiment.strategy.evaluate_every == 1


def test_a_run_that_learned_nothing_is_kept_but_never_the_best(table_file: Any) -> None:
    fake = Fake(lambda cell: math.nan if cell.rate == Rate(0.01) else 0.1)
    tuned = job(table_file(), fake)
    tuned.tune()
    full, narrow = tuned.methods
    assert tuned.best_rate(full) == Rate(0.001)
    assert tuned.best_rate(narrow) == Rate(0.1)
    assert "nothing learned" in to_text(tuning_table(tuned), 120)


def test_final_runs_before_tuning_are_refused_with_the_cells_that_lack(table_file: Any) -> None:
    with pytest.raises(ConfigError, match=r"tune/full-lr0\.001.*phase 'tune' first"):
        job(table_file(), Fake()).final()


def test_one_method_alone_can_be_run(table_file: Any) -> None:
    fake = Fake()
    job(table_file(), fake, only=("narrow",)).tune()
    assert {cell.method.name for cell in fake.cells} == {"narrow"}
    with pytest.raises(ConfigError, match="full, narrow"):
        job(table_file(), fake, only=("wide",))


def test_compare_reads_the_final_cells_a_row_a_method(table_file: Any) -> None:
    from fedpet.report.compare import compare_rows, compare_table, read_results

    whole = job(table_file(), Fake(lambda cell: 0.8 if cell.method.name == "full" else 0.6))
    whole.tune()
    whole.final()
    results = read_results(whole.final_results())
    assert [(row.group.method, row.seeds) for row in compare_rows(results)] == [
        ("full", 2),
        ("narrow", 2),
    ]
    assert "narrow" in to_text(compare_table(results), 120)


def test_where_there_is_one_rate_nothing_is_tuned(table_file: Any) -> None:
    path = table_file(methods={"full": {"learning-rates": [0.01]}})
    fake = Fake()
    running = job(path, fake)
    running.tune()
    assert not fake.ran
    running.final()
    assert fake.ran == ["final/full-seed0", "final/full-seed1"]
    assert {cell.rate for cell in fake.cells} == {Rate(0.01)}


def test_the_tuning_table_says_when_the_best_rate_lies_at_the_edge(table_file: Any) -> None:
    rates = {"full": {"learning-rates": [0.001, 0.01, 0.1]}}
    middle = job(table_file(methods=rates), Fake(lambda c: 0.9 if c.rate == Rate(0.01) else 0.1))
    middle.tune()
    assert "edge" not in to_text(tuning_table(middle), 160)
    shutil.rmtree(middle.table.results)
    edge = job(table_file(methods=rates), Fake(lambda cell: cell.rate.learning_rate))
    edge.tune()
    assert "at the edge of its grid" in to_text(tuning_table(edge), 160)


def test_a_check_runs_finished_cells_again_and_notes_what_came_out(table_file: Any) -> None:
    whole = job(table_file(), Fake())
    with pytest.raises(ConfigError, match="no finished cell"):
        whole.check(2)
    whole.tune()
    whole.final()
    before = {path: path.read_bytes() for path in whole.table.results.rglob("*.json")}
    again = Fake()
    assert job(table_file(), again).check(3)
    assert len(set(again.ran)) == 3
    checks = json.loads((whole.table.results / "checks.json").read_text())
    assert [check["same"] for check in checks] == [True] * 3
    assert {check["cell"] for check in checks} == set(again.ran)
    assert all(path.read_bytes() == content for path, content in before.items())

    assert not job(table_file(), Fake(lambda cell: 0.123)).check(1, ["final"])
    checks = json.loads((whole.table.results / "checks.json").read_text())
    assert [check["same"] for check in checks] == [True] * 3 + [False]
    assert checks[-1]["cell"].startswith("final/")
    assert checks[-1]["before"]["metric"] == 0.5
    assert checks[-1]["after"]["metric"] == 0.123


def test_the_checks_are_no_result_to_compare(table_file: Any) -> None:
    from fedpet.report.compare import read_results

    whole = job(table_file(), Fake())
    whole.tune()
    whole.check(1)
    assert len(read_results([whole.table.results])) == 4


def test_a_run_that_leaves_no_result_is_told_with_its_last_lines(
    table_file: Any, tmp_path: Path
) -> None:
    read = TableFile.read(table_file())
    cell = read.tune_cells(read.methods[0])[0]
    broken = replace(cell.experiment, backbone=replace(cell.experiment.backbone, model="/nowhere"))
    with pytest.raises(RunError, match=r"(?s)exit code 2.*no folder '/nowhere'"):
        table.run_in_process(replace(cell, experiment=broken), tmp_path, 100)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["run", "prefix"], "peft-lora"),
        (["run", "full", "absent"], "film-reviews"),
        (["run", "full", "--set", "mask.density=2"], "a fraction of the entries"),
        (["table", "absent.toml"], "no table file"),
        (["table", "absent.toml", "--phase", "last"], "tune, final"),
        (["table"], "FILE"),
    ],
)
def test_bad_input_on_the_command_line_is_one_sentence_and_exit_code_2(
    arguments: list[str],
    word: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert word in capsys.readouterr().err


def _command(arguments: list[str], timeout: float = 100) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join((*filter(None, sys.path), str(REPOSITORY)))
    return subprocess.run(
        [sys.executable, "-m", "simulations.benchmarks", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.mark.simulation
@pytest.mark.timeout(320)
def test_a_table_of_one_cell_runs_on_ray_and_is_not_run_again(table_file: Any) -> None:
    path = table_file(
        methods={"head": {"learning-rates": [0.1]}},
        set=["strategy.num-rounds=1"],
        final={"split": "test", "seeds": [0]},
    )
    done = _command(["table", str(path), "--phase", "final"], 300)
    assert done.returncode == 0, done.stderr
    file = path.parent / "results" / "small" / "final" / "head-seed0.json"
    cell = json.loads(file.read_text())
    assert cell["result"]["run"]["status"] == "ok"
    assert cell["result"]["communication"]["messages"] == 8
    assert "head" in done.stdout
    again = _command(["table", str(path), "--phase", "final"])
    assert again.returncode == 0, again.stderr
    assert "1 of 1 cells are there already" in again.stderr

    # The same settings on a grid in this process: the same bytes.
    read = TableFile.read(path)
    settings = read.final_cells(read.methods[0], Rate(0.1))[0].experiment
    settings = replace(settings, run=replace(settings.run, out=str(path.parent / "here")))
    assert run("head", settings)["final_values_sha256"] == cell["result"]["final_values_sha256"]
