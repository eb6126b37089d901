"""A run of objects is the run of the experiment file that names the same things."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

import fedpet
from fedpet.config import Experiment
from fedpet.errors import InputError

REST: dict[str, Any] = {
    "training": {"learning_rate": 0.01, "batch_size": 4},
    "clients": {"min_rows": 2},
    "strategy": {"clients_per_round": 4},
    "num_rounds": 2,
    "backend": "in-process",
    "progress": False,
}
CONFIG = fedpet.PetConfig(
    mask=fedpet.MaskConfig(density=0.05),
    modules=[fedpet.LoraConfig(r=2, target_modules=["query", "value"]), fedpet.LayerNormConfig()],
    seed=3,
)


@pytest.fixture(scope="module")
def base(files: tuple[Path, Path]) -> PreTrainedModel:
    torch.manual_seed(5)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        files[0], num_labels=2
    )
    return model


@pytest.fixture(scope="module")
def rows(files: tuple[Path, Path]) -> DatasetDict:
    folder = files[1]
    splits = {split: str(folder / f"{split}.jsonl") for split in ("train", "test")}
    return load_dataset("json", data_files=splits)


@pytest.fixture(scope="module")
def by_file(
    files: tuple[Path, Path], base: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory
) -> fedpet.Run:
    """The job by an experiment file, which names the saved model and the rows' folder."""
    folder = tmp_path_factory.mktemp("by-file")
    base.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(files[0]).save_pretrained(folder / "model")
    structure = fedpet.get_pet_model(
        AutoModelForSequenceClassification.from_pretrained(folder / "model"), CONFIG
    ).structure
    (folder / "structure.json").write_text(structure.to_json())
    file = folder / "job.toml"
    file.write_text(f"""
[run]
name = "job"
seed = 3
out = "{folder / "run"}"
[backbone]
model = "{folder / "model"}"
[data]
source = "{files[1]}"
max-length = 16
[clients]
min-rows = 2
[mask]
density = 0.05
[structure]
file = "{folder / "structure.json"}"
[training]
learning-rate = 0.01
batch-size = 4
[strategy]
num-rounds = 2
clients-per-round = 4
""")
    return fedpet.simulate(file, backend="in-process", progress=False)


def described(rows: Any, files: tuple[Path, Path], **more: Any) -> fedpet.FederatedDataset:
    more = {"client_column": "client", **more}
    tokenizer = AutoTokenizer.from_pretrained(files[0])
    return fedpet.load_federated_dataset(rows, tokenizer=tokenizer, max_length=16, **more)


@pytest.fixture
def data(rows: DatasetDict, files: tuple[Path, Path]) -> fedpet.FederatedDataset:
    return described(rows, files)


def fresh(base: PreTrainedModel) -> PreTrainedModel:
    import copy

    return copy.deepcopy(base)


def sha(run: fedpet.Run) -> str:
    return str(run.result["final_values_sha256"])


def test_a_pet_model_and_rows_in_memory_give_the_values_of_the_same_job_by_file(
    base: PreTrainedModel, data: Any, by_file: fedpet.Run, tmp_path: Path
) -> None:
    model = fedpet.get_pet_model(fresh(base), CONFIG)
    run = fedpet.simulate(model, data, out=tmp_path / "run", **REST)
    assert sha(run) == sha(by_file)
    assert run.result["run"]["fingerprint"] == by_file.result["run"]["fingerprint"]
    assert run.metrics == by_file.metrics
    assert run.ledger.uplink_bytes == by_file.ledger.uplink_bytes
    assert not model.get_delta().any()  # the caller's own stays as it was


def test_a_plain_model_with_a_pet_config_is_the_pet_model_of_both(
    base: PreTrainedModel, data: Any, by_file: fedpet.Run, tmp_path: Path
) -> None:
    model = fresh(base)
    run = fedpet.simulate(model, data, pet_config=CONFIG, out=tmp_path / "run", **REST)
    assert sha(run) == sha(by_file)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_name_with_a_pet_config_and_a_folder_of_rows_are_taken_as_they_are(
    base: PreTrainedModel, files: tuple[Path, Path], by_file: fedpet.Run, tmp_path: Path
) -> None:
    tables = Experiment.from_file(by_file.folder / "config.toml").to_tables()
    data = fedpet.load_federated_dataset(files[1], client_column="client", max_length=16)
    run = fedpet.simulate(
        tables["backbone"]["model"], data, pet_config=CONFIG, out=tmp_path / "run", **REST
    )
    assert sha(run) == sha(by_file)
    again = Experiment.from_file(run.folder / "config.toml").to_tables()
    assert again["data"]["source"] == tables["data"]["source"]


def test_a_model_that_was_loaded_from_a_folder_of_all_its_weights_is_named_by_it(
    rows: DatasetDict, files: tuple[Path, Path], by_file: fedpet.Run, tmp_path: Path
) -> None:
    folder = Experiment.from_file(by_file.folder / "config.toml").backbone.model
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    data = fedpet.load_federated_dataset(rows, client_column="client", max_length=16)
    run = fedpet.simulate(model, data, pet_config=CONFIG, out=tmp_path / "run", **REST)
    assert sha(run) == sha(by_file)
    assert Experiment.from_file(run.folder / "config.toml").backbone.model == folder


def test_a_run_of_objects_that_was_stopped_is_resumed_from_its_folder_alone(
    base: PreTrainedModel, data: Any, by_file: fedpet.Run, tmp_path: Path
) -> None:
    class Stop(fedpet.Callback):
        def on_round_end(self, record: Any, ledger: Any) -> None:
            if record.round == 1:
                raise ZeroDivisionError

    model = fedpet.get_pet_model(fresh(base), CONFIG)
    with pytest.raises(ZeroDivisionError):
        fedpet.simulate(model, data, out=tmp_path / "run", callbacks=[Stop()], **REST)
    del model
    run = fedpet.resume(tmp_path / "run", backend="in-process", progress=False)
    assert sha(run) == sha(by_file)
    assert run.result["run"]["resumed"] == 1


def test_a_run_gives_metrics_history_books_and_the_model_at_the_final_values(
    by_file: fedpet.Run, base: PreTrainedModel, tmp_path: Path
) -> None:
    run = fedpet.Run(by_file.folder)
    assert run.metrics["accuracy"] == run.history[-1]["accuracy"]
    assert [row["round"] for row in run.history] == [0, 1, 2]
    assert run.history[-1]["total_bytes"] == run.ledger.total_bytes
    assert 0 < run.ledger.ratio_to_dense < 1
    if pytest.importorskip("pandas"):
        assert run.history.to_pandas().loc[1, "loss"] == run.history[1]["loss"]
    values = np.load(run.folder / "checkpoint" / "values.npy")
    assert np.array_equal(run.model.get_delta().numpy(), values)
    run.model.merge_and_unload().save_pretrained(tmp_path / "mine")
    mine = AutoModelForSequenceClassification.from_pretrained(tmp_path / "mine").state_dict()
    theirs = AutoModelForSequenceClassification.from_pretrained(run.folder / "model").state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_the_same_objects_twice_are_written_once(
    base: PreTrainedModel, rows: DatasetDict, files: tuple[Path, Path], tmp_path: Path
) -> None:
    rest = {**REST, "run": {"cache": str(tmp_path / "cache")}, "num_rounds": 1}
    for number in range(2):
        copy = {
            split: Dataset.from_list(rows[split].to_list(), features=rows[split].features)
            for split in rows
        }
        fedpet.simulate(
            fedpet.get_pet_model(fresh(base), CONFIG),
            described(DatasetDict(copy), files),
            out=tmp_path / f"run{number}",
            **rest,
        )
    for kind in ("models", "datasets", "structures", "tokenizers"):
        assert len(list((tmp_path / "cache" / kind).iterdir())) == 1


def test_a_trained_pet_model_goes_on_from_its_values_as_run_start_does(
    by_file: fedpet.Run, data: Any, tmp_path: Path
) -> None:
    model = by_file.model
    run = fedpet.simulate(model, data, out=tmp_path / "objects", **REST)
    assert run.history[0]["accuracy"] == by_file.metrics["accuracy"]
    settings = Experiment.from_file(by_file.folder / "config.toml")
    again = fedpet.simulate(
        settings,
        run={"start": str(by_file.folder), "out": str(tmp_path / "by-file")},
        backend="in-process",
        progress=False,
    )
    assert sha(run) == sha(again) != sha(by_file)


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    return str(caught.value)


def test_what_cannot_become_a_run_is_refused_in_one_sentence(
    base: PreTrainedModel, rows: DatasetDict, files: tuple[Path, Path], tmp_path: Path
) -> None:
    data = described(rows, files)

    def simulate(model: Any, **settings: Any) -> str:
        return refused(
            lambda: fedpet.simulate(model, data, out=tmp_path / "run", **{**REST, **settings})
        )

    pet = fedpet.get_pet_model(fresh(base), CONFIG)
    assert "Known are" in simulate(pet, trainning={"batch_size": 4})
    assert "Known are" in simulate(pet, training={"batchsize": 4})
    assert "decided by the model" in simulate(pet, mask={"density": 0.1})
    assert "decided by the model" in simulate(pet, run={"seed": 4})
    assert "leave pet_config out" in simulate(pet, pet_config=CONFIG)
    assert "backend must be one of" in simulate(pet, backend="thread")
    assert "tensorboard, wandb" in simulate(pet, callbacks=["mlfow"])
    assert "simulate needs rows" in refused(lambda: fedpet.simulate(pet))
    assert "a model must be" in simulate(7)
    three = AutoModelForSequenceClassification.from_pretrained(files[0], num_labels=3)
    assert "num_labels=2" in simulate(fedpet.get_pet_model(three, CONFIG))
    named = fresh(base)
    named.config.id2label = {0: "cat", 1: "dog"}
    words = [{**row, "label": ("neg", "pos")[row["label"]]} for row in rows["train"]]
    data = described(words, files)
    assert "'cat', 'dog'" in simulate(named, pet_config=CONFIG)
    pooler = fedpet.PetConfig(modules=[fedpet.LayerNormConfig()], modules_to_save=["pooler"])
    assert "leave modules_to_save out" in simulate(fedpet.get_pet_model(fresh(base), pooler))
    assert not (tmp_path / "run").exists()
