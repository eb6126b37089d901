"""The trainables alone, written to a folder and put on their backbone again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, backbone, batch, loss_of, mask_of
from safetensors.torch import load_file
from tiny import Silent

from fedpet import HiwiConfig, LayerNormConfig, LoraConfig, PetConfig
from fedpet.backbone.pretrained import load_backbone
from fedpet.config import BackboneConfig, Experiment, MaskConfig
from fedpet.errors import BackboneError, InputError
from fedpet.pet.factory import get_pet_model
from fedpet.pet.model import PetModel
from fedpet.pet.pet_files import VALUES_FILE
from fedpet.pet.structure import Structure
from fedpet.protocol.plan import Plan
from fedpet.run.prepare import prepare

CONFIG = PetConfig(
    mask=MaskConfig(density=0.02),
    modules=[LoraConfig(r=2), LayerNormConfig(), HiwiConfig(r=2, on="weight")],
    seed=4,
)


def _base(name: str = "bert", *, new_head: bool = False) -> Any:
    model = backbone(name).model
    if new_head:
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "classifier" in key or "score" in key or "head" in key:
                    parameter.add_(1.0)
    return model


def _moved(pet: PetModel) -> PetModel:
    generator = torch.Generator().manual_seed(1)
    pet.set_delta(0.05 * torch.randn(pet.num_values, generator=generator))
    return pet


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_saved_trainables_on_the_backbone_with_another_head_are_the_same_model(
    name: str, tmp_path: Path
) -> None:
    pet, inputs = _moved(get_pet_model(_base(name), CONFIG)), batch(name)
    with torch.no_grad():
        before = pet(**inputs).logits
    pet.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(pet(**inputs).logits, before)
    again = PetModel.from_pretrained(_base(name, new_head=True), tmp_path)
    assert torch.equal(again.get_delta(), pet.get_delta())
    assert again.segments == pet.segments
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, before)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 16 * pet.num_values + 20_000


def test_training_goes_on_from_what_was_saved_as_from_the_model_itself(tmp_path: Path) -> None:
    pet, inputs = _moved(get_pet_model(_base(), CONFIG)), batch("bert")
    pet.save_pretrained(tmp_path)
    deltas = []
    for one in (pet, PetModel.from_pretrained(_base(new_head=True), tmp_path)):
        optimizer = torch.optim.AdamW(one.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(one, inputs).backward()
            optimizer.step()
        deltas.append(one.get_delta())
    assert torch.equal(*deltas)


def test_adapters_on_biases_are_saved_as_the_biases_that_they_came_to(tmp_path: Path) -> None:
    pet = _moved(get_pet_model(_base(), PetConfig(modules=[HiwiConfig(r=2)])))
    pet.save_pretrained(tmp_path)
    again = PetModel.from_pretrained(_base(), tmp_path)
    assert torch.equal(again.get_delta(), pet.get_delta())


def test_a_mask_that_no_configuration_gives_is_saved_with_its_positions(tmp_path: Path) -> None:
    base = backbone("bert")
    mask = mask_of(base, 0.01)
    base.fingerprint = ""
    pet = _moved(PetModel(base, mask, Structure(), seed=0))
    pet.save_pretrained(tmp_path)
    again = PetModel.from_pretrained(_base(), tmp_path)
    assert again.mask is not None
    assert again.mask.digest() == mask.digest()
    assert torch.equal(again.get_delta(), pet.get_delta())


@pytest.mark.parametrize("broadcast", ["recompute", "send"])
def test_the_model_of_a_run_is_saved_and_loaded_on_a_model_of_the_user_s_own(
    broadcast: str, experiment: Callable[..., Experiment], files: tuple[Path, Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    prepared = prepare(experiment(mask_broadcast=broadcast), Silent())
    plan = Plan.from_bytes(prepared.plan.to_bytes())
    nodes = plan.build(load_backbone(BackboneConfig(model=str(files[0])), num_outputs=2))
    for place, pet in (("server", prepared.pet), ("node", nodes)):
        _moved(pet).save_pretrained(tmp_path / place)
        assert not any("positions" in name for name in load_file(tmp_path / place / VALUES_FILE))
        base = AutoModelForSequenceClassification.from_pretrained(files[0], num_labels=2)
        again = PetModel.from_pretrained(base, tmp_path / place)
        assert torch.equal(again.get_delta(), pet.get_delta())


def test_the_tier_in_use_is_the_one_that_is_saved(tmp_path: Path) -> None:
    config = PetConfig(mask=MaskConfig(density=0.02, tiers=("0.005=0.5", "0.02=0.5")))
    pet = get_pet_model(_base(), config)
    pet.set_tier(0)
    _moved(pet).save_pretrained(tmp_path)
    again = PetModel.from_pretrained(_base(), tmp_path)
    assert again.segments == pet.segments != pet.tiers[-1]
    assert torch.equal(again.get_delta(), pet.get_delta())


@pytest.mark.parametrize("other", ["one weight", "architecture", "labels"])
def test_another_backbone_is_refused_with_the_right_one_named(other: str, tmp_path: Path) -> None:
    get_pet_model(_base(), CONFIG).save_pretrained(tmp_path)
    model = _base("roberta" if other == "architecture" else "bert")
    with torch.no_grad():
        if other == "one weight":
            next(model.parameters())[3, 3] += 1
    if other == "labels":
        model.classifier = torch.nn.Linear(32, 5)
    with pytest.raises(BackboneError, match=r"belong to the backbone .*fingerprint.*load that one"):
        PetModel.from_pretrained(model, tmp_path)


@pytest.mark.parametrize(
    "damage", ["absent", "no json", "schema", "values", "half", "mask", "type"]
)
def test_a_folder_that_does_not_fit_is_refused_in_one_sentence(damage: str, tmp_path: Path) -> None:
    pet = get_pet_model(_base(), CONFIG)
    pet.save_pretrained(tmp_path)
    config, values = tmp_path / "pet_config.json", tmp_path / "pet_model.safetensors"
    table = json.loads(config.read_text())
    if damage == "absent":
        config.unlink()
    elif damage == "no json":
        config.write_text("{")
    elif damage == "schema":
        config.write_text(json.dumps(table | {"schema": 99}))
    elif damage == "values":
        values.write_bytes(values.read_bytes()[:200])
    elif damage == "type":
        config.write_text(json.dumps(table | {"mask": table["mask"] | {"density": "all"}}))
    elif damage == "mask":
        config.write_text(json.dumps(table | {"mask": {"shape": "round"}}))
    else:
        config.write_text(json.dumps(table | {"mask": None}))
    with pytest.raises(InputError, match=r"save_pretrained|newer|mask.density must be") as refused:
        PetModel.from_pretrained(_base(), tmp_path)
    assert "\n" not in str(refused.value)


def test_the_fingerprint_is_that_of_the_checkpoint_whatever_was_trained() -> None:
    pet, twin = get_pet_model(_base(), CONFIG), get_pet_model(_base(new_head=True), PetConfig())
    _moved(pet)
    assert pet.fingerprint() == twin.fingerprint()
