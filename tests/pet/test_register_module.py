"""A kind of module of one's own: registered in this file, and known everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from architectures import backbone, batch, loss_of
from torch import Tensor, nn

from fedpet import (
    CustomModuleConfig,
    GatedModule,
    ModuleConfig,
    PetConfig,
    get_pet_model,
    register_module,
)
from fedpet.backbone.module_roles import find_target_modules
from fedpet.config import TrainingConfig
from fedpet.errors import ConfigError
from fedpet.pet.model import PetModel
from fedpet.pet.modules.registry import DENSE, KINDS, PRESETS, linears
from fedpet.pet.structure import ModuleSpec, Structure, preset
from fedpet.search.space import SPACES, build_space


class GainConfig(ModuleConfig):
    """Names gains in a `PetConfig`."""


class Gain(GatedModule):
    """A dense layer's output times 1 + v."""

    place = "sequential"

    def __init__(self, target: str, width: int) -> None:
        super().__init__("gain", target)
        self._width = width

    @classmethod
    def build(cls, spec: ModuleSpec, module: nn.Module, seed: int) -> Gain:
        return cls(spec.target, module.out_features)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return ((self._width,),)

    def effect(self, x: Tensor | None) -> Tensor:
        return x * self.trainables[0]

    def merge(self, module: nn.Module) -> None:
        module.weight.mul_(1 + self.trainables[0][:, None])
        if module.bias is not None:
            module.bias.mul_(1 + self.trainables[0])


@pytest.fixture
def gain() -> Iterator[None]:
    register_module(
        "gain",
        targets=DENSE,
        usual=linears("value"),
        size=lambda d_in, d_out, rank: d_out,
        config=GainConfig,
        spaces={"mergeable": linears("value")},
    )(Gain)
    yield
    del KINDS["gain"], PRESETS["gain"]


def _model() -> Any:
    return backbone("bert").model


@pytest.mark.usefixtures("gain")
def test_a_module_of_ones_own_trains_averages_and_merges() -> None:
    pets = [get_pet_model(_model(), PetConfig(modules=[CustomModuleConfig(kind="gain")]))
            for _ in range(2)]  # fmt: skip
    values = "bert.encoder.layer.{}.attention.self.value"
    assert [s.name for s in pets[0].segments if s.kind == "gain"] == [
        values.format(0),
        values.format(1),
    ]
    for seed, pet in enumerate(pets):
        optimizer = torch.optim.AdamW(pet.parameters(), lr=0.05)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = loss_of(pet, batch("bert", seed=seed))
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0]
        assert pet.trainable["gain"].abs().max() > 0.01
    mean = (pets[0].get_delta() + pets[1].get_delta()) / 2
    mean_model = get_pet_model(_model(), PetConfig(modules=[CustomModuleConfig(kind="gain")]))
    mean_model.set_delta(mean)
    with torch.no_grad():
        adapted = mean_model(**batch("bert")).logits
        merged = [pet.merge_and_unload() for pet in (mean_model, *pets)]
        torch.testing.assert_close(merged[0](**batch("bert")).logits, adapted)
    for name, parameter in merged[0].named_parameters():
        both = [dict(model.named_parameters())[name] for model in merged[1:]]
        torch.testing.assert_close(parameter, (both[0] + both[1]) / 2)


@pytest.mark.usefixtures("gain")
def test_structure_search_space_rates_and_estimate_know_it_from_its_registration() -> None:
    base = backbone("bert")
    found = preset("lnfit+gain", find_target_modules(base.model), rank=4, scale=2.0)
    specs = [spec for spec in found.modules if spec.kind == "gain"]
    assert [(spec.rank, spec.scale) for spec in specs] == [(0, 1.0)] * 2
    assert Structure.from_json(found.to_json()) == found
    assert "gain" not in PetModel(base, None, found, seed=0).inexact_kinds
    space = build_space(backbone("bert").model, "mergeable")
    candidates = [c for c in space.candidates if c.spec.kind == "gain"]
    assert [candidate.size for candidate in candidates] == [32, 32]
    assert TrainingConfig(learning_rates=("gain=0.5",)).rate_of("gain") == 0.5


@pytest.mark.usefixtures("gain")
def test_its_own_configuration_names_it_as_the_name_does() -> None:
    positions = find_target_modules(_model())
    for where in (None, ["query"], "all-linear"):
        own = PetConfig(modules=[GainConfig(target_modules=where)])
        named = PetConfig(modules=[CustomModuleConfig(kind="gain", target_modules=where)])
        assert own.structure(positions) == named.structure(positions)


def test_a_configuration_that_no_kind_is_registered_with_is_refused() -> None:
    with pytest.raises(ConfigError, match="GainConfig belongs to no kind of module"):
        PetConfig(modules=[GainConfig()]).structure(find_target_modules(_model()))


@pytest.mark.usefixtures("gain")
def test_in_a_space_it_stands_behind_the_kinds_that_come_with_fedpet() -> None:
    space = build_space(backbone("bert").model, "mergeable")
    of_value = [
        c.spec.kind for c in space.candidates if c.spec.target.endswith("0.attention.self.value")
    ]
    assert of_value == ["lora", "bitfit", "gain"]


@pytest.mark.parametrize(
    ("space", "kinds"),
    [
        ("mergeable", {
            "ffn-up": ["lora", "hiwi-weight", "bitfit", "hiwi-bias"],
            "attention-norm": ["lnfit", "ln-bias"],
            "key": ["lora"],
            "pooler": ["lora", "bitfit"],
        }),
        ("s3pet-mix", {
            "ffn-up": ["lora-factors", "bitfit"],
            "attention-norm": ["bitfit", "lnfit"],
            "key": ["lora-factors", "bitfit"],
            "self-attention": ["lowrank-adapter"],
        }),
        ("s3pet-lora", {"ffn-up": ["lora-factors"], "key": ["lora-factors"], "ffn-norm": []}),
    ],
)  # fmt: skip
def test_the_candidates_of_a_position_have_the_order_that_searches_always_had(
    space: str, kinds: dict[str, list[str]]
) -> None:
    candidates = build_space(backbone("bert").model, space).candidates
    for role, expected in kinds.items():
        found = [c for c in candidates if c.position.role == role]
        first = [c.spec.kind for c in found if c.spec.target == found[0].spec.target]
        assert first == expected, role


@pytest.mark.usefixtures("gain")
def test_a_name_that_is_taken_is_refused() -> None:
    class Other(Gain):
        @classmethod
        def build(cls, spec: ModuleSpec, module: nn.Module, seed: int) -> Gain:
            return super().build(spec, module, seed)

    register_module("gain", targets=DENSE, usual=linears(), size=lambda i, o, r: o)(Gain)
    with pytest.raises(ConfigError, match=r"name of its own, and 'gain' is Gain"):
        register_module("gain", targets=DENSE, usual=linears(), size=lambda i, o, r: o)(Other)


@pytest.mark.parametrize("name", ["bert", "t5", "llama", "gpt2", "albert"])
@pytest.mark.parametrize("space", SPACES)
def test_the_size_of_every_kind_is_what_its_module_sends(name: str, space: str) -> None:
    base = backbone(name)
    for candidate in build_space(base.model, space, head=base.head, rank=2).candidates:
        spec = candidate.spec
        if spec.kind == "mask":  # no module: test_search_joint.py
            continue
        assert isinstance(spec, ModuleSpec)
        module = KINDS[spec.kind].build(spec, base.model.get_submodule(spec.target), 0)
        assert module.num_values == candidate.size, spec
        assert module.exact == KINDS[spec.kind].exact
