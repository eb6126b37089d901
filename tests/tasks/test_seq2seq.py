"""A text for a text: targets shifted once, transformers' loss, and what greedy decoding writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process_run import run
from sending import LOSSLESS
from seq2seq_models import MODELS, WORDS, save_model
from tiny import Silent

from fedpet.config import DataConfig, Experiment
from fedpet.data.rows import NO_LABEL
from fedpet.errors import ConfigError
from fedpet.run.prepare import Prepared, prepare
from fedpet.training.generation import Writer
from fedpet.training.token_loss import token_loss


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name in MODELS:
        save_model(folder / name, name)
    generator = np.random.default_rng(2)
    for split in ("train", "test"):
        lines = []
        for index in range(24):
            word = WORDS[4 + index % 2]
            text = " ".join([*generator.choice(WORDS[6:], size=2 + index % 4), word])
            target = f"the film is {word}" if index % 3 else word
            lines.append(
                json.dumps({"text": text, "response": target, "client": f"client {index % 3}"})
            )
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def experiment(files: Path, tmp_path: Path) -> Callable[..., Experiment]:
    def make(name: str, **changes: Any) -> Experiment:
        tables: dict[str, dict[str, Any]] = {
            "run": {
                "out": str(tmp_path / "run"), "cache": str(tmp_path / "cache"), "sample-prompts": 0,
            },
            "backbone": {"model": str(files / name)},
            "data": {
                "source": str(files), "task": "seq2seq", "response-column": "response",
                "max-length": 16, "metric": "perplexity",
            },
            "clients": {"min-rows": 2},
            "mask": {"density": 0.1},
            "training": {"learning-rate": 0.02, "batch-size": 4},
            "codec": {key.replace("_", "-"): value for key, value in LOSSLESS.items()},
            "strategy": {"num-rounds": 2, "clients-per-round": 3},
        }  # fmt: skip
        for key, value in changes.items():
            stage, _, key_of = key.partition("_")
            tables[stage][key_of.replace("_", "-")] = value
        return Experiment.from_tables(tables)

    return make


def prepared_of(experiment: Experiment) -> Prepared:
    found = prepare(experiment, Silent())
    assert isinstance(found, Prepared)
    return found


@pytest.mark.parametrize("chunk_bytes", [1 << 25, 100])
@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_transformers_own_of_the_same_labels(
    name: str, chunk_bytes: int, experiment: Callable[..., Experiment]
) -> None:
    prepared = prepared_of(experiment(name))
    model: Any = prepared.pet.model
    batch = prepared.data.train.batch(np.arange(6))
    labels, made = batch.pop("labels"), batch["decoder_input_ids"]
    theirs = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels
    ).loss
    ours = token_loss(model, batch, labels, shift=False, chunk_bytes=chunk_bytes)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    theirs_shifted = model.prepare_decoder_input_ids_from_labels(labels=labels)
    inside = labels != NO_LABEL
    assert torch.equal(made[inside], theirs_shifted[inside])
    assert (labels[inside] != 0).all()
    assert (labels == 1).sum() == 6  # each target's end token is a label


@pytest.mark.parametrize("name", MODELS)
def test_a_run_lowers_the_perplexity_and_its_model_scores_the_same(
    name: str, experiment: Callable[..., Experiment], files: Path
) -> None:
    from transformers import AutoModelForSeq2SeqLM

    settings = experiment(name)
    result = run(settings)
    quality = result["quality"]
    assert quality["final"] < quality["before"]
    assert result["model"]["head_values"] == 0
    model = AutoModelForSeq2SeqLM.from_pretrained(Path(settings.run.out) / "model")
    rows = prepared_of(settings).data.evaluation
    batch = rows.batch(np.arange(len(rows)))
    del batch["decoder_input_ids"]
    with torch.no_grad():
        assert model(**batch).loss.item() == pytest.approx(quality["metrics"]["loss"], rel=1e-4)
    written = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=8,
        do_sample=False, num_beams=1,
    )  # fmt: skip
    exact = []
    for row, target in enumerate(batch["labels"]):
        wanted = target[target != NO_LABEL]
        exact.append(torch.equal(written[row, 1 : 1 + len(wanted)], wanted))
    assert quality["metrics"]["exact_match"] == pytest.approx(np.mean(exact))
    texts = Writer(files / name, 8).write(model, rows, np.arange(len(rows)))
    hits = [one.text == one.wanted for one in texts]
    assert quality["metrics"]["exact_match"] == pytest.approx(np.mean(hits))
    assert texts[0].prompt == " ".join(WORDS[i] for i in batch["input_ids"][0] if i > 0)


@pytest.mark.slow
def test_enough_training_writes_every_target(experiment: Callable[..., Experiment]) -> None:
    settings = experiment(
        "t5", data_metric="exact_match", mask_density=1.0, strategy_num_rounds=25,
        strategy_evaluate_every=25, training_learning_rate=0.01,
    )  # fmt: skip
    quality = run(settings)["quality"]
    assert quality["final"] > quality["before"]
    assert quality["metrics"]["token_accuracy"] > 0.6


def test_rates_are_derived_of_an_encoder_and_a_decoder(
    experiment: Callable[..., Experiment],
) -> None:
    prepared = prepared_of(experiment("bart", training_learning_rate="auto"))
    rates = prepared.plan.training.learning_rates
    assert {entry.partition("=")[0] for entry in rates} == {"mask", "lnfit"}


def test_a_target_must_be_named_and_a_decoder_must_be_there(
    experiment: Callable[..., Experiment], files: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"writes the text of data\.response-column"):
        DataConfig(task="seq2seq", metric="perplexity")
    from language_models import save_model as save_causal

    save_causal(tmp_path / "llama", "llama")
    with pytest.raises(ValueError, match="names no decoder_start_token_id"):
        prepare(experiment("t5", backbone_model=str(tmp_path / "llama")), Silent())
