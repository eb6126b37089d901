"""A text's logits are its own: whatever else is in its batch, and whoever reads the plain model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process_run import run
from shipped import KINDS, WORDS, load, ship, tokenizer_of
from tiny import Silent

from fedpet.config import ClientsConfig, Experiment
from fedpet.data import Rows, load_data
from fedpet.errors import BackboneError, DataError
from fedpet.export.plain_model import write_model
from fedpet.export.saved_run import merge_run
from fedpet.run.federate import prepare
from fedpet.training.evaluation import predict
from fedpet.training.input_checks import check_inputs

NUM_ROWS = 24


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of one to twelve words, with a score: a correlation shows what an accuracy hides."""
    folder = tmp_path_factory.mktemp("rows")
    generator = np.random.default_rng(3)
    for split in ("train", "test"):
        lines = []
        for index in range(NUM_ROWS):
            words = generator.choice(WORDS, size=1 + index % 12)
            row = {"text": " ".join(words), "client": f"c{index % 2}"}
            lines.append(json.dumps({**row, "score": float(generator.normal())}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def experiment_on(checkpoint: Path, rows: Path, out: Path, **data: Any) -> Experiment:
    settings = {"source": str(rows), "task": "regression", "metric": "pearson", "max-length": 96}
    return Experiment.from_tables(
        {
            "run": {"name": "padding", "out": str(out), "cache": str(out.parent / "cache")},
            "backbone": {"model": str(checkpoint)},
            "data": {**settings, "label-column": "score", **data},
            "clients": {"client-column": "client", "min-rows": 2},
            "mask": {"density": 0.05},
            "structure": {"preset": "lnfit"},
            "training": {"learning-rate": 0.01, "batch-size": 8},
            "strategy": {"num-rounds": 1, "clients-per-round": 2},
        }
    )


def plain_logits(folder: Path, rows: Path, batch_size: int) -> np.ndarray:
    """By transformers alone, from the run's plain model."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    lines = (rows / "test.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    logits = []
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(texts[start : start + batch_size], padding=True, return_tensors="pt")
        with torch.no_grad():
            logits.append(model(**batch).logits.numpy())
    return np.concatenate(logits)


def check_plain_model(result: dict[str, Any], folder: Path, rows: Path) -> None:
    """Row by row and in batches, plain transformers gives what the run reported."""
    alone, together = (plain_logits(folder / "model", rows, size) for size in (1, 8))
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-5)
    lines = (rows / "test.jsonl").read_text(encoding="utf-8").splitlines()
    scores = [json.loads(line)["score"] for line in lines]
    for logits in (alone, together):
        found = np.corrcoef(logits[:, 0].astype(np.float64), scores)[0, 1]
        assert found == pytest.approx(result["quality"]["final"], abs=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_the_plain_model_gives_what_was_reported_row_by_row_and_in_batches(
    rows: Path, tmp_path: Path, name: str
) -> None:
    checkpoint = ship(name, tmp_path / name)
    result = run(experiment_on(checkpoint, rows, tmp_path / "run"))
    check_plain_model(result, tmp_path / "run", rows)


def rows_of(checkpoint: Path, rows: Path, cache: Path) -> Rows:
    data = experiment_on(checkpoint, rows, cache).data
    population = ClientsConfig(partition="iid", num_clients=2, min_rows=2)
    return load_data(data, population, checkpoint, cache=cache).evaluation


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_pipeline_takes_the_plain_model_in_batches(rows: Path, tmp_path: Path, name: str) -> None:
    from transformers import pipeline

    checkpoint = ship(name, tmp_path / "made", num_labels=3)
    model = load(checkpoint, num_outputs=3)
    evaluation = rows_of(checkpoint, rows, tmp_path / "cache")
    check_inputs(model, evaluation, 96)
    write_model(model, checkpoint, tmp_path / "model")
    lines = (rows / "test.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    classify = pipeline("text-classification", model=str(tmp_path / "model"), top_k=None)
    found = [max(answer["score"] for answer in told) for told in classify(texts, batch_size=8)]
    expected = torch.from_numpy(predict(model, evaluation)).softmax(-1).max(-1).values
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


# What the configuration names, what the tokeniser does, and where they should meet.
@pytest.mark.parametrize(
    ("name", "config", "tokenizer", "of_config", "of_tokenizer"),
    [
        ("llama", {"pad_token_id": 0}, {}, 0, 0),  # the tokeniser names none
        ("llama", {"pad_token_id": -1}, {}, 2, 2),  # an older way to name none
        ("llama", {"eos_token_id": [2, 1]}, {"eos_token": None}, 1, 1),  # "</s>" is a word here
        ("gpt2", {"pad_token_id": 0}, {}, 50256, 50256),  # no word has this number
        ("gpt2", {"pad_token_id": 6}, {}, 50256, 50256),  # and this one is "good"
        ("mistral", {"pad_token_id": 2}, {"pad_token": "<unk>"}, 0, 0),
        ("qwen2", {"pad_token_id": 257}, {}, 256, 256),
        ("roberta", {}, {"pad_token": "<unk>"}, 1, 3),  # it counts positions from its own
        ("bert", {"pad_token_id": None}, {}, 0, 0),
        ("bert", {}, {"pad_token": "[SEP]"}, 0, 3),  # both may stay as they are
        ("gpt2", {}, {"padding_side": "left"}, 50256, 50256),
        ("llama", {}, {"padding_side": "left"}, 2, 2),
        ("xlnet", {}, {"padding_side": "right"}, 5, 5),
    ],
)
def test_logits_are_the_same_alone_and_in_batches_whatever_names_the_padding(
    rows: Path,
    tmp_path: Path,
    name: str,
    config: dict[str, Any],
    tokenizer: dict[str, Any],
    of_config: int,
    of_tokenizer: int,
) -> None:
    from transformers import AutoTokenizer

    checkpoint = ship(name, tmp_path / "made", tokenizer=tokenizer_of(name, **tokenizer), **config)
    model = load(checkpoint, num_outputs=1)
    evaluation = rows_of(checkpoint, rows, tmp_path / "cache")
    check_inputs(model, evaluation, 96)
    write_model(model, checkpoint, tmp_path / "model")
    expected = predict(model, evaluation, batch_size=5)
    np.testing.assert_allclose(predict(model, evaluation, batch_size=1), expected, atol=1e-5)
    for size in (1, 8):
        found = plain_logits(tmp_path / "model", rows, size)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert model.config.pad_token_id == of_config
    assert AutoTokenizer.from_pretrained(tmp_path / "model").pad_token_id == of_tokenizer


def test_padding_that_the_model_has_no_embedding_for_gives_way_to_the_end_token(
    rows: Path, tmp_path: Path
) -> None:
    longer = tokenizer_of("llama")
    longer.add_special_tokens({"pad_token": "[PAD]"})
    assert longer.pad_token_id == 17
    for size, expected in ((17, 2), (18, 17)):
        checkpoint = ship("llama", tmp_path / f"{size}", tokenizer=longer, vocab_size=size)
        assert rows_of(checkpoint, rows, tmp_path / "cache").pad_id == expected


def test_a_tokeniser_without_any_special_token_is_refused_with_what_to_do(
    rows: Path, tmp_path: Path
) -> None:
    bare = tokenizer_of("gpt2", eos_token=None, unk_token=None)
    checkpoint = ship("gpt2", tmp_path / "made", tokenizer=bare, eos_token_id=None)
    with pytest.raises(DataError, match=r'^the tokeniser .* name one as "pad_token" in token'):
        rows_of(checkpoint, rows, tmp_path / "cache")


def test_a_model_that_reads_its_padding_is_refused_before_the_run(
    rows: Path, tmp_path: Path
) -> None:
    checkpoint = ship("xlnet", tmp_path / "made")
    evaluation = rows_of(checkpoint, rows, tmp_path / "cache")
    assert evaluation.pad_left
    with pytest.raises(BackboneError, match=r"^the logits of XLNet.* depend on .* on the right\)"):
        check_inputs(load(checkpoint), replace(evaluation, pad_left=False), 96)


def test_a_model_that_cannot_be_called_is_refused_before_the_run(
    rows: Path, tmp_path: Path
) -> None:
    checkpoint = ship("t5", tmp_path / "made")
    settings = json.loads((checkpoint / "config.json").read_text())
    del settings["decoder_start_token_id"]  # which the class has no default for
    (checkpoint / "config.json").write_text(json.dumps(settings))
    with pytest.raises(
        BackboneError, match=r"^T5ForSequenceClassification cannot be called .*mend"
    ):
        prepare(experiment_on(checkpoint, rows, tmp_path / "run"), Silent())


def test_a_merged_run_names_the_padding_that_the_run_had(rows: Path, tmp_path: Path) -> None:
    checkpoint = ship("mistral", tmp_path / "made", pad_token_id=1)
    run(experiment_on(checkpoint, rows, tmp_path / "run"))
    merge_run(tmp_path / "run", tmp_path / "merged")
    expected = plain_logits(tmp_path / "run" / "model", rows, 8)
    np.testing.assert_allclose(plain_logits(tmp_path / "merged", rows, 8), expected, atol=1e-6)
    for name in ("config.json", "tokenizer_config.json"):
        texts = [(tmp_path / folder / name).read_text() for folder in ("run/model", "merged")]
        assert texts[0] == texts[1]


@pytest.mark.parametrize("left", [False, True])
def test_padding_stands_on_one_side_and_the_row_on_the_other(left: bool) -> None:
    tokens = np.arange(1, 8, dtype=np.int32)
    rows = Rows(tokens, np.array([0, 2, 7]), np.zeros(2, np.int64), None, pad_id=9, pad_left=left)
    batch = rows.batch(np.array([1, 0]))
    short = [9, 9, 9, 1, 2] if left else [1, 2, 9, 9, 9]
    assert batch["input_ids"].tolist() == [[3, 4, 5, 6, 7], short]
    assert batch["attention_mask"].tolist()[1] == [int(token != 9) for token in short]
    assert rows.take(np.array([0])).pad_left is left
