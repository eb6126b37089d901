"""Checkpoints that come with a head: the tiny BERT, saved as a model that classifies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tiny import make_backbone

BERT_TENSORS = 39  # of the tiny BERT with its pooler


def make_classifier(folder: Path, names: tuple[str, ...] = (), *, outputs: int = 2) -> Path:
    """Save the tiny BERT with a random head; `names` are what its config calls its classes."""
    from transformers import BertForSequenceClassification

    make_backbone(folder)
    torch.manual_seed(3)
    model = BertForSequenceClassification.from_pretrained(folder, num_labels=outputs)
    with torch.no_grad():
        model.classifier.weight.normal_()
        model.classifier.bias.normal_()
    if names:
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: index for index, name in enumerate(names)}
    model.save_pretrained(folder)
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint of one file."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def change_config(folder: Path, **changes: Any) -> Path:
    """Write entries into a checkpoint's config.json."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps(config))
    return folder


def name_rows(folder: Path, names: dict[int, str]) -> Path:
    """Turn the labels of rows from indices into names."""
    for file in folder.glob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        lines = [json.dumps({**row, "label": names[row["label"]]}) for row in rows]
        file.write_text("\n".join(lines) + "\n")
    return folder
