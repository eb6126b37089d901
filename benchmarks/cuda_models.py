"""Build models of random weights, and hold a section's device, time and findings, for `cuda_check`.

BERTs in MiniLM's and BERT-base's sizes: laws, time and memory do not depend on what a checkpoint
has learned, and none has to be there.
"""

from __future__ import annotations

import copy
import functools
import gc
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedpet.backbone.module_roles import find_target_modules, maskable_weights
from fedpet.backbone.pretrained import Backbone
from fedpet.config import MaskConfig
from fedpet.pet.mask import Mask, build_mask
from fedpet.pet.model import PetModel
from fedpet.pet.structure import preset

# layers, width, inner width, heads
SIZES = {"tiny": (2, 32, 64, 2), "minilm": (6, 384, 1536, 12), "bert-base": (12, 768, 3072, 12)}
VOCABULARY = 30522


@dataclass(frozen=True)
class Place:
    """Hold a section's device, its time, and the function that takes its findings."""

    device: str
    tiny: bool
    finish: float  # on `time.monotonic`'s clock
    found: Callable[[str, Any], None]

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.finish - time.monotonic()

    def synchronise(self) -> None:
        """Wait for what was launched."""
        if self.device == "cuda":
            torch.cuda.synchronize()


@contextmanager
def noted(place: Place, name: str) -> Iterator[None]:
    """Turn an error of one part of a section into a finding, so that the others go on."""
    try:
        yield
    except Exception:
        place.found(name, {"error": traceback.format_exc()[-3000:]})
        gc.collect()


@functools.cache
def random_model(size: str, vocabulary: int) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    layers, width, inner, heads = SIZES[size]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
    )
    model = BertForSequenceClassification(config).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def fresh_backbone(size: str, device: str, vocabulary: int = VOCABULARY) -> Backbone:
    """Return a fresh copy of the size's one random model, frozen, on the device."""
    model = copy.deepcopy(random_model(size, vocabulary)).to(device)
    head = tuple(name for name, _ in model.named_parameters() if name.startswith("classifier"))
    return Backbone(size, Path("."), model, head, "0" * 64)


@functools.cache
def mask_of(size: str, density: float, vocabulary: int = VOCABULARY) -> Mask:
    model = random_model(size, vocabulary)
    head = [name for name, _ in model.named_parameters() if name.startswith("classifier")]
    return build_mask(maskable_weights(model, head), MaskConfig(density=density))


def pet_model(base: Backbone, mask: Mask | None, names: str) -> PetModel:
    positions = find_target_modules(base.model, base.head)
    return PetModel(base, mask, preset(names, positions, rank=8, scale=2.0), seed=3)


def batch_of(
    rows: int, tokens: int, device: str, vocabulary: int
) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, vocabulary, (rows, tokens), generator=generator)
    attention = torch.ones_like(ids)
    attention[-1, tokens // 2 :] = 0
    labels = torch.randint(0, 2, (rows,), generator=generator)
    inputs = {"input_ids": ids.to(device), "attention_mask": attention.to(device)}
    return inputs, labels.to(device)
