"""A text's logits are its own: whatever else is in its batch, and whoever reads the plain model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shipped import KINDS, WORDS, ship
from whole_runs import run, threads_as_before

from fedpet.config import Experiment

NUM_ROWS = 24


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    yield from threads_as_before()


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
            "population": {"client-column": "client", "min-rows": 2},
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
