"""A textbook loop on the packaged MiniLM: our loop's values, and a plain model at the end."""

from __future__ import annotations

import numpy as np
import torch

import fedpet
from fedpet.backbone.pretrained import load_backbone
from fedpet.config import BackboneConfig, TrainingConfig
from fedpet.data import Rows, Task
from fedpet.training.batching import batches
from fedpet.training.loop import train_rows
from fedpet.utils.seeds import derive_seed

CONFIG = fedpet.PetConfig(
    mask=fedpet.MaskConfig(density=0.001),
    modules=[
        fedpet.LoraConfig(r=8, target_modules=["query", "value"]),
        fedpet.LayerNormConfig(),
        fedpet.HiwiConfig(r=4),
    ],
)
SEED = 2
TRAINING = TrainingConfig(learning_rate=1e-3, batch_size=4, padding_free=False)


def _rows() -> Rows:
    generator = np.random.default_rng(0)
    lengths = generator.integers(6, 20, 16)
    return Rows(
        tokens=generator.integers(1000, 20000, int(lengths.sum())).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        labels=generator.integers(0, 2, 16),
        types=None,
        pad_id=0,
    )


def _pet() -> fedpet.PetModel:
    return fedpet.get_pet_model(load_backbone(BackboneConfig(), num_outputs=2).model, CONFIG)


def test_minilm_trained_by_a_textbook_loop_has_our_loops_values_to_the_bit() -> None:
    rows = _rows()
    indices = np.arange(len(rows))
    pet = _pet()
    train_rows(
        pet.model, pet.parameter_groups(), rows, indices,
        Task("classification", ("bad", "good"), "accuracy"), TRAINING,
        seed=SEED, after_step=pet.after_step,
    )  # fmt: skip
    ours = pet.get_delta()

    pet = _pet()
    optimizer = torch.optim.AdamW(pet.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    generator = np.random.default_rng(derive_seed("batches", SEED))
    for chosen in batches(indices, rows.lengths, TRAINING.batch_size, generator):
        optimizer.zero_grad()
        loss = pet(**rows.batch(chosen)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(pet.parameters(), TRAINING.clip_norm)
        optimizer.step()
    assert torch.equal(pet.get_delta(), ours)
    inputs = {key: value for key, value in rows.batch(indices).items() if key != "labels"}
    with torch.no_grad():
        adapted = pet(**inputs).logits
        merged = pet.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).logits, adapted, rtol=1e-5, atol=1e-5)
    assert type(merged).__name__ == "BertForSequenceClassification"
