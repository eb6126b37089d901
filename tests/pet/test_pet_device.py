"""A PetModel that is moved to another device goes on there."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from architectures import backbone, batch
from fake_gpu import second_device

from fedpet import HiwiConfig, LayerNormConfig, LoraConfig, PetConfig
from fedpet.config import MaskConfig
from fedpet.pet.factory import get_pet_model
from fedpet.pet.model import PetModel

with_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
DEVICES = ["second", pytest.param("cuda", marks=with_gpu)]


def _on(device: str) -> AbstractContextManager[torch.device]:
    return second_device() if device == "second" else nullcontext(torch.device(device))


def _pet(name: str) -> PetModel:
    modules = [LoraConfig(r=2), LayerNormConfig()]
    if name not in ("t5", "llama"):  # no biases
        modules.append(HiwiConfig(r=2))
    config = PetConfig(mask=MaskConfig(density=0.05), modules=modules)
    return get_pet_model(backbone(name).model, config)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "llama"])
def test_a_model_that_is_moved_trains_on_as_it_did_and_comes_back(name: str, device: str) -> None:
    inputs, losses, deltas = batch(name), {}, {}
    with _on(device) as there:
        for where in (torch.device("cpu"), there):
            pet = _pet(name)
            optimizer = torch.optim.SGD(pet.parameters(), lr=1e-4)
            losses[where] = []
            for step in range(4):
                if step == 2:
                    pet.to(where)
                    if device == "second":  # no parameter can lie there and here
                        optimizer = torch.optim.SGD(pet.parameters(), lr=1e-4)
                on = pet.device
                optimizer.zero_grad()
                logits = pet(**{key: tensor.to(on) for key, tensor in inputs.items()}).logits
                loss = logits.square().sum()
                loss.backward()
                optimizer.step()
                losses[where].append(float(loss.detach().cpu()))
            assert on.type == where.type
            assert {parameter.device.type for parameter in pet.parameters()} == {where.type}
            pet.to("cpu")
            deltas[where] = pet.get_delta()
            with torch.no_grad():
                adapted = pet(**inputs).logits
                plain = pet.merge_and_unload()(**inputs).logits
            torch.testing.assert_close(plain, adapted, rtol=1e-4, atol=1e-5)
    here, there_too = losses.values()
    assert here[-1] < here[0]
    torch.testing.assert_close(there_too, here, rtol=1e-3, atol=1e-4)
    one, other = deltas.values()
    assert one.abs().max() > 1e-4
    torch.testing.assert_close(other, one, rtol=1e-2, atol=1e-4 * float(one.abs().max()))
