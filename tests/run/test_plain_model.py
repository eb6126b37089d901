"""The plain model that a run leaves: its classes by name, whole or absent, readable."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import architectures
import classifiers
import in_process_run
import pytest
import tiny
import torch

from fedpet.backbone.pretrained import load_for_task
from fedpet.client.node_config import NodeConfig
from fedpet.config import BackboneConfig
from fedpet.data import Task
from fedpet.errors import ConfigError, RunError
from fedpet.export.plain_model import write_model
from fedpet.export.saved_run import merge_run
from fedpet.run.federate import federate, prepare
from fedpet.run.local_grid import LocalGrid
from fedpet.run.resume import check_journal, read_cut_short
from fedpet.run.run_folder import RunFolder, new_run_folder
from fedpet.utils.atomic_write import atomic_write, whole_folder

TEXTS = tuple(name for name in architectures.ARCHITECTURES if name != "vit")  # it reads images
GRADES = ("bad", "fair", "good")


def _bart() -> Any:
    """Its config class has three labels, where others have two."""
    import transformers as t

    return t.BartForSequenceClassification(
        t.BartConfig(
            vocab_size=60,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,
            decoder_start_token_id=3,
        )
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_backbone(tmp_path_factory.mktemp("tokenizer") / "bert")


def plain_model(name: str, task: Task, tokenizer: Path, folder: Path) -> tuple[Any, Path]:
    """Load the architecture's bare encoder for a task, and write it as a run would."""
    model = _bart() if name == "bart" else architectures.backbone(name).model
    model.base_model.save_pretrained(folder / "checkpoint")
    backbone = load_for_task(BackboneConfig(model=str(folder / "checkpoint")), task)
    write_model(backbone.model, tokenizer, folder / "model")
    return backbone.model, folder / "model"


@pytest.mark.parametrize("classes", [("neg", "pos"), GRADES, ("LABEL_0", "LABEL_1")])
@pytest.mark.parametrize("name", [*TEXTS, "bart"])
def test_a_plain_model_loads_and_names_its_classes(
    name: str, classes: tuple[str, ...], tokenizer: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification, pipeline

    task = Task("classification", classes, "accuracy")
    before, folder = plain_model(name, task, tokenizer, tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(folder)
    assert again.config.id2label == dict(enumerate(classes))
    assert again.config.label2id == {label: index for index, label in enumerate(classes)}
    assert again.config.problem_type == "single_label_classification"
    after = dict(again.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.named_parameters())
    if not name.startswith("t5"):  # its texts end with a token that this tokeniser has not
        told = pipeline("text-classification", model=str(folder), top_k=None)(["good film"])[0]
        assert {one["label"] for one in told} == set(classes)


@pytest.mark.parametrize("name", ["bert", "bart"])
def test_a_plain_model_of_a_regression_has_one_output(
    name: str, tokenizer: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    _, folder = plain_model(name, Task("regression", (), "pearson"), tokenizer, tmp_path)
    config = AutoModelForSequenceClassification.from_pretrained(folder).config
    assert (config.num_labels, config.problem_type) == (1, "regression")
    assert config.id2label == {0: "value"}


def test_the_plain_model_answers_as_the_run_was_measured_though_the_checkpoint_named_the_opposite(
    tmp_path: Path,
) -> None:
    """Of the run and of `fedpet merge`: class 0 is neg, and the checkpoint called it POSITIVE."""
    from transformers import pipeline

    backbone = classifiers.make_classifier(tmp_path / "bert", ("POSITIVE", "NEGATIVE"))
    rows = classifiers.name_rows(tiny.make_rows(tmp_path / "rows"), {0: "pos", 1: "neg"})
    experiment = tiny.make_experiment(
        backbone, rows, tmp_path / "run", training_learning_rate=0.03, data_max_length=32
    )
    final = in_process_run.run(experiment)["quality"]["final"]
    assert final > 0.6
    merge_run(tmp_path / "run", tmp_path / "merged")
    test = [json.loads(line) for line in (rows / "test.jsonl").read_text().splitlines()]
    for folder in (tmp_path / "run" / "model", tmp_path / "merged"):
        classify = pipeline("text-classification", model=str(folder))
        told = [classify(row["text"])[0]["label"] for row in test]
        right = sum(label == row["label"] for label, row in zip(told, test, strict=True))
        assert right / len(test) == pytest.approx(final)


# Who may read it.


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def modes(folder: Path) -> set[int]:
    return {file.stat().st_mode & 0o777 for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_whatever_a_run_leaves_is_readable_by_whom_the_umask_lets(
    tokenizer: Path, tmp_path: Path, mask: int, mode: int
) -> None:
    with umask(mask):
        rows = tiny.make_rows(tmp_path / "rows", clients=4)
        experiment = tiny.make_experiment(tokenizer, rows, tmp_path / "run", strategy_num_rounds=1)
        in_process_run.run(experiment)
        merge_run(tmp_path / "run", tmp_path / "merged")
    assert (tmp_path / "run" / "checkpoint" / "values.npy").is_file()
    assert modes(tmp_path / "run") == modes(tmp_path / "merged") == {mode}


def test_a_file_and_a_folder_written_whole_have_the_modes_of_the_umask(tmp_path: Path) -> None:
    with umask(0o027):
        atomic_write(tmp_path / "file", b"-")
        with whole_folder(tmp_path / "folder") as building:
            os.close(os.open(building / "own", os.O_CREAT, 0o600))
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert modes(tmp_path / "folder") == {0o640}
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750


# The disk.


def full_disk(monkeypatch: pytest.MonkeyPatch, file_bytes: int) -> Callable[[], None]:
    """Let no file of a model grow beyond so many bytes; gives what makes room again."""
    from transformers import PreTrainedModel

    save = PreTrainedModel.save_pretrained

    def save_on_a_full_disk(model: Any, *args: Any, **kwargs: Any) -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, before[1]))
        try:
            save(model, *args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_on_a_full_disk)
    return lambda: monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)


@pytest.mark.parametrize("file_bytes", [10, 20_000])  # of its config.json, and of its weights
def test_a_run_whose_disk_is_full_at_the_plain_model_says_so_and_is_resumed(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_bytes: int
) -> None:
    rows = tiny.make_rows(tmp_path / "rows", clients=4)
    expected = in_process_run.run(
        tiny.make_experiment(tokenizer, rows, tmp_path / "whole", strategy_num_rounds=2)
    )
    experiment = tiny.make_experiment(tokenizer, rows, tmp_path / "run", strategy_num_rounds=2)
    make_room = full_disk(monkeypatch, file_bytes)
    with pytest.raises(RunError, match=r"cannot be written.*Make room.*--resume"):
        in_process_run.run(experiment)
    assert not (tmp_path / "run" / "model").exists()
    assert not list((tmp_path / "run").glob(".*"))
    make_room()
    prepared = prepare(read_cut_short(tmp_path / "run"), tiny.Silent())
    journal = check_journal(tmp_path / "run", prepared)
    assert journal is not None
    assert journal.server_round == 2
    grid = LocalGrid.of(NodeConfig.from_experiment(experiment), 1)
    result = federate(grid, prepared, RunFolder(tmp_path / "run"), tiny.Silent(), journal)
    assert result["final_values_sha256"] == expected["final_values_sha256"]
    whole, resumed = (
        classifiers.stored(tmp_path / folder / "model") for folder in ("whole", "run")
    )
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_a_merge_on_a_full_disk_says_so_and_leaves_nothing(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tiny.make_rows(tmp_path / "rows", clients=4)
    experiment = tiny.make_experiment(tokenizer, rows, tmp_path / "run", strategy_num_rounds=1)
    federate(
        LocalGrid.of(NodeConfig.from_experiment(experiment), 1),
        prepare(experiment, tiny.Silent()),
        new_run_folder(experiment),
        tiny.Silent(),
    )
    (tmp_path / "there").mkdir()
    make_room = full_disk(monkeypatch, 20_000)
    for out in (tmp_path / "there", tmp_path / "new"):
        with pytest.raises(RunError, match=r"cannot be written.*Make room"):
            merge_run(tmp_path / "run", out)
    assert list((tmp_path / "there").iterdir()) == []
    assert not (tmp_path / "new").exists()
    make_room()
    for out in (tmp_path / "there", tmp_path / "deep" / "new"):
        merge_run(tmp_path / "run", out)
        assert (out / "model.safetensors").is_file()
        assert not list(out.glob(".*"))
    with pytest.raises(ConfigError, match="it is a file"):
        merge_run(tmp_path / "run", tmp_path / "run" / "plan.bin")


def test_files_of_a_folder_that_is_there_come_into_it_together(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text("old")
    place = folder.stat().st_ino
    with pytest.raises(OSError, match="nowhere"), whole_folder(folder) as building:
        (building / "config.json").rename(folder / "nowhere" / "config.json")
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    assert (folder / "config.json").read_text() == "old"
    with whole_folder(folder) as building:
        (building / "config.json").write_text("new")
    assert (folder / "config.json").read_text() == "new"
    assert folder.stat().st_ino == place  # a disk may be mounted there
