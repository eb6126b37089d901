"""The sparse kernel computes what the dense reference says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedpet.backbone.pretrained import Backbone
from fedpet.pet.mask import Mask
from fedpet.pet.model import PetModel
from fedpet.pet.modules.masked_linear import MaskedLinear
from fedpet.pet.structure import Structure


class _Net(nn.Module):
    """Dense layers in repeated blocks, as a mask looks for them."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            [nn.Sequential(nn.Linear(24, 40, bias), nn.GELU(), nn.Linear(40, 24, bias))] * 1
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layer:
            x = x + block(x)
        return x


def _pair(density: float, bias: bool) -> tuple[PetModel, Any, list[MaskedLinear]]:
    generator = torch.Generator().manual_seed(2)
    torch.manual_seed(0)
    net = _Net(bias)
    reference, masked, positions = copy.deepcopy(net), [], {}
    for index in (0, 2):
        layer = reference.layer[0][index]
        count = layer.weight.numel()
        chosen = torch.randperm(count, generator=generator)[: int(density * count)]
        masked.append(MaskedLinear(layer, chosen))
        reference.layer[0][index] = masked[-1]
        positions[f"layer.0.{index}.weight"] = chosen
    sizes = {name: net.get_parameter(name).numel() for name in positions}
    net.requires_grad_(False)
    backbone = Backbone("net", Path(), net, (), "0" * 64)  # type: ignore[arg-type]
    return PetModel(backbone, Mask(positions, sizes), Structure(), seed=0), reference, masked


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 70, 24), (1, 512, 24)])
def test_outputs_gradients_and_steps_are_those_of_the_dense_reference(
    shape: tuple[int, ...], density: float, bias: bool
) -> None:
    pet, reference, masked = _pair(density, bias)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator)
    if len(shape) == 3:
        x[:, shape[1] // 2 :] = 0  # padding: most of its tokens' gradients vanish
    weight = torch.randn(shape, generator=generator) * (x != 0)
    mine = torch.optim.SGD(pet.parameters(), lr=0.01)
    theirs = torch.optim.SGD([layer.change for layer in masked], lr=0.01)
    for _ in range(3):
        outputs = []
        for model, optimizer in ((pet, mine), (reference, theirs)):
            optimizer.zero_grad()
            outputs.append(model(x))
            (outputs[-1] * weight).sum().backward()
            optimizer.step()
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    expected = torch.cat([layer.values() for layer in masked])
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(pet.get_delta(), expected, rtol=1e-3, atol=1e-5)


def test_the_reference_moves_no_other_entry() -> None:
    _, reference, masked = _pair(0.1, True)
    before = [layer.start + layer.mask * layer.change.detach() for layer in masked]
    optimizer = torch.optim.AdamW([layer.change for layer in masked], lr=0.1, weight_decay=0.0)
    reference(torch.ones(2, 24)).sum().backward()
    optimizer.step()
    for layer, was in zip(masked, before, strict=True):
        now = layer.start + layer.mask * layer.change.detach()
        moved = torch.nonzero((now != was).flatten()).flatten()
        assert set(moved.tolist()) == set(layer.positions.tolist())
