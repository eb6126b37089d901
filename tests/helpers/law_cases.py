"""A model, a batch and its labels for each task and architecture, to hold laws against."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from image_models import model_of as image_model
from language_models import model_of as language_model
from seq2seq_models import model_of as seq2seq_model
from speech_models import model_of as whisper
from torch import Tensor

NO_LABEL = -100
# Task and architecture of each; the targets of LoRA and of HiWi on weights.
CASES: dict[str, tuple[str, str, list[str]]] = {
    "llama": ("language-modelling", "llama", ["q_proj", "v_proj"]),
    "llama-tied": ("language-modelling", "llama-tied", ["q_proj", "v_proj"]),
    "gpt2": ("language-modelling", "gpt2", ["c_attn"]),
    "t5": ("seq2seq", "t5", ["q", "v"]),
    "bart": ("seq2seq", "bart", ["q_proj", "v_proj"]),
    "whisper": ("speech-to-text", "whisper", ["q_proj", "v_proj"]),
    "vit": ("image-classification", "vit", ["q_proj", "v_proj"]),
    "dinov2": ("image-classification", "dinov2", ["q_proj", "v_proj"]),
    "several classes, llama": ("multi-label-classification", "llama", ["q_proj", "v_proj"]),
    "several classes, gpt2": ("multi-label-classification", "gpt2", ["c_attn"]),
    "words, llama": ("token-classification", "llama", ["q_proj", "v_proj"]),
    "words, gpt2": ("token-classification", "gpt2", ["c_attn"]),
    "a word, t5": ("text-to-text-classification", "t5", ["q", "v"]),
    "a word, bart": ("text-to-text-classification", "bart", ["q_proj", "v_proj"]),
}
GENERATORS = ("llama", "llama-tied", "gpt2", "t5", "bart", "whisper")


class Case(NamedTuple):
    """Inputs and labels as `Rows.batch` makes them, and labels as transformers takes them."""

    task: str
    model: Any
    targets: list[str]
    inputs: dict[str, Tensor]
    labels: Tensor
    theirs: Tensor


def case_of(name: str) -> Case:
    """Make a fresh case: equal names give equal models and batches."""
    task, architecture, targets = CASES[name]
    generator = torch.Generator().manual_seed(7)
    model = _model(task, architecture)
    ids = torch.randint(4, 12, (3, 7), generator=generator)
    there = torch.ones_like(ids)
    there[2, 4:] = 0
    inputs = {"input_ids": ids, "attention_mask": there}
    if task == "language-modelling":
        labels = ids.masked_fill(there == 0, NO_LABEL)
    elif task == "image-classification":
        inputs = {"pixel_values": torch.randn(3, 3, 28, 28, generator=generator)}
        labels = torch.tensor([0, 2, 1])
    elif task == "multi-label-classification":
        labels = torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 0]])
    elif task == "token-classification":
        labels = (ids % 3).masked_fill(there == 0, NO_LABEL)
        labels[:, ::3] = NO_LABEL
    else:
        if task == "speech-to-text":
            inputs = {"input_features": torch.randn(3, 8, 100, generator=generator)}
        own = torch.tensor([[5, 6, 1], [7, 1, NO_LABEL], [5, 6, 1]])
        start = model.config.decoder_start_token_id
        read = own.masked_fill(own == NO_LABEL, 0).roll(1, 1)
        read[:, 0] = start
        inputs["decoder_input_ids"] = read
        labels = own
        if task == "text-to-text-classification":
            choices = torch.stack([own[0], own[1]]).expand(3, 2, 3)
            labels = torch.cat([own[:, None], choices], 1)
            return Case(task, model, targets, inputs, labels, own)
    return Case(task, model, targets, inputs, labels, labels)


def _model(task: str, architecture: str) -> Any:
    import transformers as t

    if architecture in ("vit", "dinov2"):
        return _with_classes(image_model(architecture), "single_label_classification")
    if architecture == "whisper":
        return whisper()
    if architecture in ("t5", "bart"):
        return seq2seq_model(architecture)
    plain = language_model(architecture)
    if task == "language-modelling":
        return plain
    config = plain.config
    config.num_labels, config.pad_token_id = 3, 2
    kinds = {
        "token-classification": t.AutoModelForTokenClassification,
        "multi-label-classification": t.AutoModelForSequenceClassification,
    }
    if task == "multi-label-classification":
        config.problem_type = "multi_label_classification"
    torch.manual_seed(1)
    made = kinds[task].from_config(config).eval()
    made.base_model.load_state_dict(plain.base_model.state_dict())
    return made


def _with_classes(model: Any, problem: str) -> Any:
    """Give a model of images a classifier of three classes."""
    torch.manual_seed(1)
    model.classifier = torch.nn.Linear(model.classifier.in_features, 3)
    model.config.num_labels, model.num_labels = 3, 3
    model.config.problem_type = problem
    return model
