"""The benchmark of plain Flower trains fedpet's clients on fedpet's rows, by peft and FedAvg."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from benchmarks import lora_app, plain_flower
from benchmarks.plain_flower import METHODS, Marks, clients_of, job_of
from fedpet.backbone.pretrained import locate
from fedpet.client.node_config import cache_folder
from fedpet.config import Experiment
from fedpet.data import load_data
from fedpet.protocol.request import wire_bytes
from fedpet.run.local_grid import LocalGrid

HIDDEN, INNER, LAYERS, OUTPUTS = 32, 64, 2, 2
HEAD = OUTPUTS * HIDDEN + OUTPUTS


class AppGrid(LocalGrid):
    """Nodes in this process that answer as the app does."""

    def __init__(self, job: lora_app.Job) -> None:
        super().__init__({number: lambda payload: payload for number in range(1, 7)})
        self.asked: list[tuple[int, str]] = []
        self._job = job

    def _answer(self, message: Message) -> Message:
        told = message.content.config_records["config"]
        self.asked.append((int(told["server-round"]), str(told["client"])))
        return lora_app.train(message, self._job)


def run(method: str, settings: Experiment, folder: Path) -> tuple[AppGrid, Any, Message, Message]:
    folder.mkdir()
    rows = clients_of(settings)
    job = job_of(method, settings, rows, folder)
    names, grid, marks = sorted(rows), AppGrid(job), Marks()
    replies, sent, reply = lora_app.serve(grid, job, lambda number: names[:number], marks.note)
    assert replies == job.num_rounds
    assert len(marks.rounds()) == job.num_rounds - 1
    return grid, names, sent, reply


def arrays(message: Message) -> dict[str, np.ndarray]:
    (record,) = message.content.array_records.values()
    return {name: array.numpy() for name, array in record.items()}


def test_its_clients_hold_the_texts_and_classes_of_fedpets(experiment: Any) -> None:
    from transformers import AutoTokenizer

    settings = experiment()
    data = load_data(
        settings.data, settings.clients, locate(settings.backbone), cache=cache_folder(settings)
    )
    tokenizer, rows = AutoTokenizer.from_pretrained(locate(settings.backbone)), clients_of(settings)
    assert list(rows) == [client.id for client in data.clients]
    for client in data.clients:
        for row, (text, label) in zip(client.rows, rows[client.id], strict=True):
            tokens = data.train.tokens[data.train.offsets[row] : data.train.offsets[row + 1]]
            assert tokenizer(text)["input_ids"] == tokens.tolist()
            assert label == data.train.labels[row]


@pytest.mark.parametrize("method", [method for method in METHODS if method != "fedpet"])
def test_each_client_drawn_trains_peft_lora_and_the_head(
    experiment: Any, method: str, tmp_path: Path
) -> None:
    settings = experiment(strategy_num_rounds=2, training_learning_rate=0.01)
    grid, names, sent, reply = run(method, settings, tmp_path / "app")
    assert grid.asked == [(1, names[0]), (2, names[0]), (2, names[1])]
    before, after = arrays(sent), arrays(reply)
    assert list(before) == list(after)
    assert all(not np.array_equal(before[name], after[name]) for name in after)
    query_and_value = LAYERS * 2 * 8 * (HIDDEN + HIDDEN)
    every = LAYERS * 8 * (4 * (HIDDEN + HIDDEN) + 2 * (HIDDEN + INNER)) + 8 * (HIDDEN + HIDDEN)
    lora = every if method.endswith("-all") else query_and_value
    assert sum(value.size for value in after.values()) == lora + HEAD
    assert wire_bytes(reply) > 4 * (lora + HEAD)


def test_a_model_kept_in_the_process_trains_to_the_same_values(
    experiment: Any, tmp_path: Path
) -> None:
    settings = experiment(strategy_num_rounds=2, training_learning_rate=0.01)
    found = [
        arrays(run(method, settings, tmp_path / method)[3]) for method in ("template", "tuned")
    ]
    for name, value in found[0].items():
        np.testing.assert_allclose(value, found[1][name], atol=1e-6)


def test_a_file_is_filled_with_the_rows_that_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[str, int]] = []

    def fake(work: Any, method: str, clients: int, rounds: int, settings: list[str]) -> Any:
        if measured[-2:] == [("tuned", 1), ("fedpet", 3)]:
            measured.append(("cut", 0))
            raise KeyboardInterrupt
        measured.append((method, clients))
        spent = {"worker": 1.0}
        row = {"down_bytes": 1, "up_bytes": 1, "peak_mb": 1, "wall_seconds": 1}
        return {**row, "method": method, "clients": clients, "processor_seconds": spent}

    def call(*arguments: str) -> list[tuple[str, int]]:
        command = ["plain_flower", "--clients", "1", "3", "--out", str(tmp_path / "out.json")]
        monkeypatch.setattr("sys.argv", [*command, "--methods", *arguments])
        plain_flower.main()
        found = json.loads((tmp_path / "out.json").read_text())
        return [(row["method"], row["clients"]) for row in found["rows"]]

    monkeypatch.setattr(plain_flower, "measure_apart", fake)
    with pytest.raises(KeyboardInterrupt):
        call("fedpet", "tuned")
    measured.clear()
    everything = [("fedpet", 1), ("tuned", 1), ("fedpet", 3), ("tuned", 3)]
    assert call("fedpet", "tuned") == everything
    assert measured == [("tuned", 3)]
    assert call("fedpet", "--again") == everything
    assert measured == [("tuned", 3), ("fedpet", 1), ("fedpet", 3)]
