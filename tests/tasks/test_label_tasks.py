"""Labels beyond one class a text: several classes, a class a word, a class that is written."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process_run import run
from task_rows import SETTINGS, experiment_maker, save_backbone, write_rows
from tiny import Silent

from fedpet.config import Experiment
from fedpet.data import Task
from fedpet.data.rows import NO_LABEL
from fedpet.errors import ConfigError, DataError
from fedpet.report.loading import read_report
from fedpet.report.page import page
from fedpet.run.prepare import Prepared, prepare
from fedpet.tasks import kind_of
from fedpet.tasks.entity_spans import spans_of
from fedpet.training.evaluation import predict
from fedpet.training.metrics import measure

TASKS = ("multi-label-classification", "token-classification", "text-to-text-classification")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("models")
    return cache(lambda task: save_backbone(folder / task, task))


@pytest.fixture
def experiment(rows: Path, backbones: Any, tmp_path: Path) -> Any:
    return experiment_maker(rows, backbones, tmp_path)


def prepared_of(settings: Experiment) -> Prepared:
    found = prepare(settings, Silent())
    assert isinstance(found, Prepared)
    return found


@pytest.mark.parametrize("task", TASKS)
def test_a_run_lowers_the_loss_and_its_saved_model_measures_the_same(
    task: str, experiment: Any
) -> None:
    import transformers

    settings = experiment(task)
    result = run(settings)
    text = page(read_report(Path(settings.run.out)))
    assert result["quality"]["metric"] in text
    losses = [point["value"] for point in result["quality"]["loss_by_round"]]
    assert losses[-1] < losses[0]
    prepared = prepared_of(settings)
    kind, data = kind_of(task), prepared.data
    folder = Path(settings.run.out) / "model"
    saved = getattr(transformers, kind.model_class).from_pretrained(folder)
    found = measure(data.task, predict(saved, data.evaluation, data.task), data.evaluation.labels)
    for name, value in result["quality"]["metrics"].items():
        assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-6)
    assert all(one["train_rows"] for one in result["data"]["classes"])


@pytest.mark.parametrize("task", TASKS)
def test_the_loss_is_transformers_own_of_the_same_labels(task: str, experiment: Any) -> None:
    prepared = prepared_of(experiment(task))
    data, model = prepared.data, prepared.pet.model
    kind = kind_of(task)
    batch = data.train.batch(np.arange(6))
    labels = batch.pop("labels")
    loss_of = kind.client_loss(data.task, data.train.labels, 0.0, torch.device("cpu"))
    ours = loss_of(model, batch, labels).item()
    own = labels[:, 0] if task.startswith("text-to-text") else labels
    batch.pop("decoder_input_ids", None)
    assert ours == pytest.approx(model(**batch, labels=own).loss.item(), rel=1e-5)


@pytest.mark.parametrize("task", ["token-classification", "image-classification"])
def test_clients_measure_the_rows_that_they_hold_out(task: str, experiment: Any) -> None:
    settings = experiment(task, clients_eval_fraction=0.3, strategy_num_rounds=1)
    measured = run(settings)["quality"]["on_clients"]
    held = [client.held_out for client in prepared_of(settings).data.clients]
    assert any(len(rows) for rows in held)
    assert measured


def test_a_row_has_each_of_its_classes_and_may_have_none(experiment: Any, rows: Path) -> None:
    prepared = prepared_of(experiment("multi-label-classification"))
    data = prepared.data
    assert data.task.label_names == ("art", "down", "up")
    wanted = [
        json.loads(line)["topics"] for line in (rows / "train.jsonl").read_text().splitlines()
    ]
    found = [
        [name for name, one in zip(data.task.label_names, row, strict=True) if one]
        for row in data.train.labels
    ]
    assert found == wanted
    assert [] in found
    assert prepared.pet.model.config.problem_type == "multi_label_classification"


def test_multi_label_metrics_are_those_of_counts_by_hand() -> None:
    task = Task("multi-label-classification", ("a", "b"), "micro_f1")
    logits = np.array([[1.0, -1.0], [1.0, 1.0], [-1.0, -1.0], [-1.0, 2.0]])
    labels = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], dtype=np.float32)
    found = measure(task, logits, labels)
    assert found["micro_f1"] == pytest.approx(2 * 3 / (4 + 4))
    assert found["macro_f1"] == pytest.approx((2 * 2 / 4 + 2 * 1 / 4) / 2)
    assert found["subset_accuracy"] == 0.5


def test_the_first_token_of_each_word_has_its_tag(experiment: Any, rows: Path) -> None:
    data = prepared_of(experiment("token-classification")).data
    batch = data.train.batch(np.arange(4))
    for line, labels in zip(
        (rows / "train.jsonl").read_text().splitlines(), batch["labels"], strict=False
    ):
        tags = json.loads(line)["tags"]
        names = [data.task.label_names[tag] for tag in labels[labels != NO_LABEL].tolist()]
        assert names == tags
    assert (batch["labels"][:, 0] == NO_LABEL).all()  # [CLS]
    weight = kind_of("token-classification").weight(data.train, np.arange(4))
    assert weight == int((batch["labels"] != NO_LABEL).sum())


# From seqeval 1.2.2, whose `get_entities` gave these, and for 20,000 random rows the same as ours.
@pytest.mark.parametrize(
    ("tags", "entities"),
    [
        ("O B-P I-P O B-L", [("L", 4, 4), ("P", 1, 2)]),
        ("I-P I-P I-L", [("L", 2, 2), ("P", 0, 1)]),
        ("B-P B-P I-P", [("P", 0, 0), ("P", 1, 2)]),
        ("B-P E-P S-P O I-P E-P", [("P", 0, 1), ("P", 2, 2), ("P", 4, 5)]),
        ("B-X-Y I-X-Y", [("X-Y", 0, 1)]),
        ("O O", []),
    ],
)
def test_entities_are_read_as_the_conll_script_reads_them(tags: str, entities: list[Any]) -> None:
    assert sorted(spans_of(tags.split())) == entities


def test_entity_f1_counts_whole_entities() -> None:
    kind = kind_of("token-classification")
    found = {name: function(np.array([[2.0, 3, 4, 1, 2, 1], [1.0, 1, 2, 0, 0, 1]]))
             for name, function in kind.metrics.items()}  # fmt: skip
    assert found["entity_f1"] == pytest.approx(2 * 1 / (2 + 2))
    assert found["token_accuracy"] == pytest.approx(4 / 6)
    assert found["loss"] == 0.5


def test_the_likeliest_word_is_the_answer(experiment: Any) -> None:
    prepared = prepared_of(experiment("text-to-text-classification"))
    data, model = prepared.data, prepared.pet.model
    assert data.task.label_names == ("bad", "good")
    scores = predict(model, data.evaluation, data.task)
    batch = data.evaluation.batch(np.arange(len(data.evaluation)))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    for index in range(2):
        word = batch["labels"][:, 1 + index]
        logits = model(**inputs, labels=word).logits.log_softmax(-1)
        expected = logits.gather(2, word[..., None]).sum((1, 2))
        np.testing.assert_allclose(scores[:, index], expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("task", "changes", "sentence"),
    [
        ("multi-label-classification", {"training_logit_adjustment": 1.0}, "shares of classes"),
        ("multi-label-classification", {"clients_partition": "dirichlet"}, "by label"),
        ("token-classification", {"clients_partition": "shards"}, "by label"),
        ("token-classification", {"training_cls_only": True}, "classifier of texts"),
        ("token-classification", {"data_text_columns": ["words", "text"]}, "one column"),
        ("text-to-text-classification", {"backbone_head": "new"}, "draws a head"),
    ],
)
def test_settings_that_a_task_cannot_have_are_refused(
    task: str, changes: dict[str, Any], sentence: str, experiment: Any
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        experiment(task, **changes)


@pytest.mark.parametrize(
    ("task", "row", "sentence"),
    [
        ("multi-label-classification", {"topics": "up"}, "row 25 .* where a list should be"),
        ("multi-label-classification", {"topics": ["sideways", None]}, "has the label None"),
        ("token-classification", {"tags": ["O"]}, "row 25 .* has 2 words and 1 tags"),
        ("token-classification", {"words": []}, "row 25 .* list of words"),
    ],
)
def test_a_row_that_breaks_its_task_is_refused_by_its_number(
    task: str, row: dict[str, Any], sentence: str, experiment: Any, rows: Path, tmp_path: Path
) -> None:
    whole = {"text": "good film", "words": ["good", "film"], "tags": ["B-A", "O"], "topics": [],
             "word": "good", "client": "client 0"}  # fmt: skip
    for split in ("train", "test"):
        lines = (rows / f"{split}.jsonl").read_text() + json.dumps({**whole, **row}) + "\n"
        (tmp_path / f"{split}.jsonl").write_text(lines)
    with pytest.raises(DataError, match=sentence):
        prepare(experiment(task, data_source=str(tmp_path)), Silent())


@pytest.mark.parametrize("task", ["multi-label-classification", "token-classification"])
def test_rows_in_memory_and_a_partitioner_of_one_s_own_are_taken(
    task: str, rows: Path, tmp_path: Path
) -> None:
    from fedpet import load_federated_dataset

    class Halves:
        """Deal the rows out to two clients, as a partitioner of flwr-datasets does."""

        dataset: Any = None
        num_partitions = 2

        def load_partition(self, index: int) -> Any:
            return self.dataset.select(range(index, len(self.dataset), 2))

    lines = [json.loads(line) for line in (rows / "train.jsonl").read_text().splitlines()]
    texts, labels = ("words", "tags") if task == "token-classification" else ("text", "topics")
    found = load_federated_dataset(
        lines, text_columns=texts, label_column=labels, task=task, metric=SETTINGS[task]["metric"],
        partitioner=Halves(), evaluation=0.25,
    )  # fmt: skip
    assert set(found.splits) == {"train", "test"}
    assert len(found.splits["train"]) + len(found.splits["test"]) == len(lines)
