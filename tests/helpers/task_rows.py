"""Rows, models and experiments of every task whose labels are more than one class a text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from image_models import save_model as save_images
from sending import LOSSLESS
from seq2seq_models import save_model as save_seq2seq
from speech_models import save_model as save_speech
from speech_models import tone
from tiny import WORDS, make_backbone

from fedpet.config import Experiment

ROWS, CLIENTS = 24, 3
SETTINGS: dict[str, dict[str, Any]] = {
    "multi-label-classification": {"label-column": "topics", "metric": "micro_f1"},
    "token-classification": {
        "text-columns": ["words"], "label-column": "tags", "metric": "entity_f1"
    },
    "text-to-text-classification": {"label-column": "word", "metric": "accuracy"},
    "speech-to-text": {
        "text-columns": ["speech"], "response-column": "text", "metric": "perplexity"
    },
    "image-classification": {
        "text-columns": ["image"], "label-column": "word", "metric": "accuracy"
    },
}  # fmt: skip


def save_backbone(folder: Path, task: str) -> Path:
    """Save a model that fits a task."""
    if task == "text-to-text-classification":
        return save_seq2seq(folder, "t5")
    if task == "speech-to-text":
        return save_speech(folder)
    if task == "image-classification":
        return save_images(folder, "vit")
    return make_backbone(folder)


def picture(generator: np.random.Generator, bright: bool) -> list[list[int]]:
    """Make a gray image of 12 x 10, bright or dark."""
    values = generator.integers(0, 128, size=(12, 10)) + (128 if bright else 0)
    return [[int(value) for value in line] for line in values]


def write_rows(folder: Path) -> Path:
    """Write rows with a label of each kind: which words are there, and where."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(5)
    for split in ("train", "test"):
        lines = []
        for index in range(ROWS):
            words = [str(word) for word in generator.choice(WORDS, size=3 + index % 4)]
            tags = ["B-A" if word in ("good", "fine") else "O" for word in words]
            for place in range(1, len(words)):
                if tags[place - 1] != "O" and words[place] in ("film", "plot"):
                    tags[place] = "I-A"
            if index == 0:
                words, tags = ["good", "film", "is"], ["B-A", "I-A", "O"]
            topics = sorted({"up": "good", "down": "bad", "art": "film"}.items())
            row = {
                "text": " ".join(words),
                "words": words,
                "tags": tags,
                "topics": [name for name, word in topics if word in words or index < 2],
                "word": "good" if "good" in words or "fine" in words else "bad",
                "image": picture(generator, "good" in words or "fine" in words),
                "speech": tone(generator, 200 + 100 * index),
                "client": f"client {index % CLIENTS}",
            }
            lines.append(json.dumps(row))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def experiment_maker(rows: Path, backbones: Callable[[str], Path], out: Path) -> Any:
    """Return what makes the experiment of a task; `changes` are `stage_key=value`."""

    def make(task: str, **changes: Any) -> Experiment:
        tables: dict[str, dict[str, Any]] = {
            "run": {"out": str(out / "run"), "cache": str(out / "cache")},
            "backbone": {"model": str(backbones(task))},
            "data": {"source": str(rows), "task": task, "max-length": 16, **SETTINGS[task]},
            "clients": {"min-rows": 2},
            "mask": {"density": 0.1},
            "structure": {"preset": "lnfit"},
            "training": {"learning-rate": 0.02, "batch-size": 4},
            "codec": {key.replace("_", "-"): value for key, value in LOSSLESS.items()},
            "strategy": {"num-rounds": 3, "clients-per-round": 3},
        }
        for key, value in changes.items():
            stage, _, name = key.partition("_")
            tables.setdefault(stage, {})[name.replace("_", "-")] = value
        return Experiment.from_tables(tables)

    return make
