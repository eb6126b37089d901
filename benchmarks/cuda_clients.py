"""Measure a round's training on one GPU: clients one by one and at once, and a large model."""

from __future__ import annotations

import gc
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cuda_models import VOCABULARY, Place, fresh_backbone, mask_of, noted, pet_model
from fedpet.backbone.module_roles import maskable_weights
from fedpet.backbone.pretrained import Backbone
from fedpet.config import MaskConfig, TrainingConfig
from fedpet.data import Rows, Task
from fedpet.pet.mask import build_mask
from fedpet.pet.model import PetModel
from fedpet.training.at_once import ClientWork, TrainedClient, train_at_once
from fedpet.training.loop import train_rows

CLIENTS = 1000
AT_ONCE, LARGE_AT_ONCE = (8, 32, 128), (2, 8)
TASK = Task("classification", ("no", "yes"), "accuracy")
# As `make run`: some twenty short texts a client, eight a batch.
FEWEST, MOST = 12, 28
SHORTEST, LONGEST = 6, 56
METHODS = {
    "mask-0.5%": (0.005, "none", False),
    "default: mask-0.1%, lora-factors+lnfit, first token": (0.001, "lora-factors+lnfit", True),
}
# By layers, width, inner width, heads, heads of keys: TinyLlama's sizes, and two layers more.
LLAMA = (24, 2048, 5632, 32, 4)
TINY_LLAMA = (2, 32, 64, 4, 2)


def clients_at_once(place: Place) -> None:
    """Train 1,000 clients of MiniLM's size, one by one (a sample, scaled) and at once."""
    size = "tiny" if place.tiny else "minilm"
    count, sample = (6, 2) if place.tiny else (CLIENTS, 24)
    rows, clients = _population(count)
    place.found("gpu", _name_of(place))
    for method, (density, names, first_token) in METHODS.items():
        config = TrainingConfig(learning_rate=1e-3, cls_only=first_token)
        with noted(place, method):
            pet = pet_model(fresh_backbone(size, place.device), mask_of(size, density), names)
            start = 0.001 * np.random.default_rng(2).standard_normal(pet.num_values)
            job = _Job(place, pet, start.astype(np.float32), rows, config)
            place.found(f"{method}: difference", job.difference(clients[:sample]))
            place.found(f"{method}: one by one", job.one_by_one(clients[:sample], count))
            for most in (4,) if place.tiny else reversed(AT_ONCE):
                with noted(place, f"{method}: {most} at once"):
                    place.found(f"{method}: {most} at once", job.at_once(clients, most))
        gc.collect()


def large_model(place: Place) -> None:
    """Train some clients of a Llama of 1.1 billion parameters, random and in float32."""
    started = time.perf_counter()
    base = _llama(place)
    place.found("gpu", _name_of(place))
    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in base.model.parameters()),
        "model_s": round(time.perf_counter() - started, 2),
    }
    started = time.perf_counter()
    mask = build_mask(maskable_weights(base.model, base.head), MaskConfig(density=0.001))
    found |= {"mask_values": mask.num_values, "mask_s": round(time.perf_counter() - started, 2)}
    started = time.perf_counter()
    pet = pet_model(base, mask, "lora")
    found |= {"values": pet.num_values, "adapted_s": round(time.perf_counter() - started, 2)}
    place.found("model", found)
    rows, clients = _population(2 if place.tiny else 16)
    start = np.zeros(pet.num_values, dtype=np.float32)
    job = _Job(place, pet, start, rows, TrainingConfig(learning_rate=1e-3, batch_size=4))
    sample = clients[:2]
    place.found("difference", job.difference(sample))
    place.found("one by one", job.one_by_one(sample, len(clients)))
    for most in LARGE_AT_ONCE[:1] if place.tiny else LARGE_AT_ONCE:
        if place.left() > 15:
            with noted(place, f"{most} at once"):
                place.found(f"{most} at once", job.at_once(clients[:most], most))


def as_text(found: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table of a round's training, and a paragraph on the large model.

    Args:
        found: The sections "clients" and "large"; others are left alone.
    """
    lines: list[str] = []
    if "clients" in found:
        rows = found["clients"]
        ways = ["one by one", *(f"{most} at once" for most in AT_ONCE)]
        lines += [f"| | {' | '.join(ways)} | peak MB |", "|---|" + "---:|" * (len(ways) + 1)]
        for method in METHODS:
            cells = [rows.get(f"{method}: {way}", {}) for way in ways]
            seconds = [cell.get(f"s_for_{CLIENTS}") for cell in cells]
            shown = " | ".join("-" if s is None else f"{s:.1f}" for s in seconds)
            peak = max(cell.get("peak_MB", 0.0) for cell in cells)
            lines.append(f"| {method} | {shown} | {peak:,.0f} |")
        apart = max(rows[f"{method}: difference"]["sgd"]["most"] for method in METHODS)
        text = (
            f"Seconds to train the {CLIENTS:,} clients of a round on one {rows['gpu']}: MiniLM's "
            f"size, {FEWEST} to {MOST} rows of {SHORTEST} to {LONGEST} tokens each, one epoch in "
            "batches of eight, float32; one by one is a sample, scaled. Values of a client differ "
            f"between the ways by {apart:.0e} at most after SGD, rounding alone."
        )
        lines += ["", textwrap.fill(text, 103, break_on_hyphens=False)]
    if "large" in found:
        rows = found["large"]
        model, most = rows["model"], f"{LARGE_AT_ONCE[-1]} at once"
        text = (
            f"A Llama of {model['parameters'] / 1e9:.2f} billion random parameters in float32 on "
            f"one {rows['gpu']}: the mask of {model['mask_values']:,} values takes "
            f"{model['mask_s']:.0f} s, a client {rows['one by one']['ms_a_client'] / 1e3:.2f} s "
            f"alone and {rows[most]['ms_a_client'] / 1e3:.2f} s of {most}, at peaks of "
            f"{rows['one by one']['peak_MB'] / 1e3:.1f} and {rows[most]['peak_MB'] / 1e3:.1f} GB."
        )
        lines += ["", textwrap.fill(text, 103, break_on_hyphens=False)]
    return "\n".join(lines).strip()


class _Job:
    """Clients of one model, trained in both ways."""

    def __init__(
        self, place: Place, pet: PetModel, start: np.ndarray, rows: Rows, config: TrainingConfig
    ) -> None:
        self._place, self._pet, self._start = place, pet, start
        self._rows, self._config = rows, config

    def alone(self, client: ClientWork, config: TrainingConfig) -> np.ndarray:
        """Train one client; return how far it moved."""
        pet = self._pet
        pet.set_delta(torch.from_numpy(self._start), seed=client.seed)
        train_rows(
            pet.model,
            pet.parameter_groups(),
            self._rows,
            client.indices,
            TASK,
            config,
            seed=client.seed,
            after_step=pet.after_step,
        )
        update: np.ndarray = pet.get_delta().numpy() - self._start
        return update

    def together(self, clients: Sequence[ClientWork], config: TrainingConfig) -> list[np.ndarray]:
        """Train clients at once; return how far each moved."""
        trained = train_at_once(self._pet, self._start, clients, self._rows, TASK, config)
        return [one.update for one in trained if isinstance(one, TrainedClient)]

    def difference(self, clients: Sequence[ClientWork]) -> dict[str, Any]:
        """Compare both ways, relative to how far a client moves.

        AdamW divides by the gradient's size, so an entry whose gradient is rounding alone may move
        by another learning rate: there the median tells.
        """
        found = {}
        for name in ("sgd", "adamw"):
            rate = 0.01 if name == "sgd" else 0.001
            config = TrainingConfig(
                optimizer=name, learning_rate=rate, cls_only=self._config.cls_only, batch_size=4
            )
            moved, apart = [], []
            together = self.together(clients, config)
            for client, update in zip(clients, together, strict=True):
                alone = self.alone(client, config)
                moved.append(np.abs(alone).max())
                apart.append(np.abs(alone - update))
            found[name] = {
                "most": float(f"{max(map(np.max, apart)):.2e}"),
                "median": float(f"{np.median(np.concatenate(apart)):.2e}"),
                "moved": float(f"{max(moved):.2e}"),
            }
        return found

    def one_by_one(self, clients: Sequence[ClientWork], count: int) -> dict[str, Any]:
        """Time a sample of clients, scaled to `count`."""
        self.alone(clients[0], self._config)
        self._begin()
        for client in clients:
            self.alone(client, self._config)
        return self._end(len(clients), count)

    def at_once(self, clients: Sequence[ClientWork], most: int) -> dict[str, Any]:
        """Time all clients, `most` at once."""
        self.together(clients[:most], self._config)
        self._begin()
        values: list[np.ndarray] = []
        for first in range(0, len(clients), most):
            values += self.together(clients[first : first + most], self._config)
            if self._place.left() < 10:
                break
        assert all(np.isfinite(own).all() for own in values)
        return self._end(len(values), len(clients))

    def _begin(self) -> None:
        gc.collect()
        if self._place.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._started = time.perf_counter()

    def _end(self, trained: int, count: int) -> dict[str, Any]:
        self._place.synchronise()
        spent = time.perf_counter() - self._started
        found = {
            "trained": trained,
            "ms_a_client": round(1e3 * spent / trained, 3),
            f"s_for_{count}": round(spent / trained * count, 2),
        }
        if self._place.device == "cuda":
            found["peak_MB"] = round(torch.cuda.max_memory_allocated() / 1e6, 1)
        return found


def _name_of(place: Place) -> str:
    return torch.cuda.get_device_name() if place.device == "cuda" else "processor"


def _population(count: int) -> tuple[Rows, list[ClientWork]]:
    """Draw rows of random tokens and labels, and clients of them."""
    generator = np.random.default_rng(1)
    sizes = generator.integers(FEWEST, MOST + 1, size=count)
    lengths = generator.integers(SHORTEST, LONGEST + 1, size=sizes.sum())
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = generator.integers(5, VOCABULARY, size=offsets[-1]).astype(np.int32)
    labels = generator.integers(0, 2, size=len(lengths))
    ends = np.cumsum(sizes)
    clients = [
        ClientWork(np.arange(end - size, end), seed)
        for seed, (size, end) in enumerate(zip(sizes, ends, strict=True))
    ]
    return Rows(tokens, offsets, labels, None, pad_id=0), clients


def _llama(place: Place) -> Backbone:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    layers, width, inner, heads, key_heads = TINY_LLAMA if place.tiny else LLAMA
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=2048,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(place.device):
        model = LlamaForSequenceClassification(config).eval().requires_grad_(False)
    head = tuple(name for name, _ in model.named_parameters() if name.startswith("score"))
    return Backbone("llama", Path("."), model, head, "0" * 64)
