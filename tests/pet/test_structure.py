"""Structures: presets find what they name, and a file is read as it was written."""

from __future__ import annotations

import json

import pytest
from architectures import backbone, structure_of

from fedpet.errors import StructureError
from fedpet.pet.model import PetModel
from fedpet.pet.structure import KINDS, PRESETS, ModuleSpec, Structure

SPECS = (
    ModuleSpec("lnfit", "a.norm"),
    ModuleSpec("lora", "a.query", 4, 2.0),
    ModuleSpec("hiwi-bias", "a.dense", 8),
)


def test_a_structure_read_from_its_file_is_the_one_that_was_written() -> None:
    found = Structure(SPECS, "f" * 64, (0.9, 0.8, 0.75), {"data": "film-reviews", "budget": 4096})
    assert Structure.from_json(found.to_json()) == found
    assert Structure.from_json(Structure().to_json()) == Structure()


def test_a_file_of_a_newer_fedpet_is_refused_with_the_reason() -> None:
    table = json.loads(Structure(SPECS).to_json())
    table["schema"] = 2
    with pytest.raises(StructureError, match=r"up to schema 1.*schema 2.*newer fedpet"):
        Structure.from_json(json.dumps(table))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "unknown key 'colour'.*Known are: schema, modules"),
        ({"modules": [{"kind": "lora", "target": "a"}]}, "rank of a 'lora' module"),
        ({"modules": [{"kind": "bitfit", "target": "a", "rank": 3}]}, "must be 0, got 3"),
        ({"modules": [{"kind": "prefix", "target": "a"}]}, "must be one of bitfit, hiwi-bias"),
        ({"modules": [{"kind": "bitfit"}]}, "needs a kind and a target"),
        ({"modules": [{"kind": "bitfit", "target": "a", "gain": 1}]}, "unknown key 'gain'"),
        ({"modules": [{"kind": "bitfit", "target": "a"}] * 2}, "one 'bitfit' module a target"),
        ({"modules": "all"}, "must be a list of objects"),
        ({"gates": [1.0]}, "1 gates for 3 modules"),
        ({"gates": ["high"]}, "must be a list of numbers"),
        ({"schema": "one"}, '"schema": 1'),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_what_came(
    change: dict[str, object], message: str
) -> None:
    table = json.loads(Structure(SPECS).to_json()) | change
    with pytest.raises(StructureError, match=message):
        Structure.from_json(json.dumps(table))
    with pytest.raises(StructureError, match="must be a JSON file"):
        Structure.from_json("{")


def test_presets_name_what_they_find() -> None:
    base = backbone("bert")
    assert structure_of(base, "none").modules == ()
    assert len(structure_of(base, "lnfit").modules) == 4
    lora = structure_of(base, "lora", rank=4, scale=2.0).modules
    assert {m.target.rpartition(".")[2] for m in lora} == {"query", "value"}
    assert {(m.rank, m.scale) for m in lora} == {(4, 2.0)}
    both = structure_of(base, "hiwi-bias+lnfit", rank=4)
    assert [m.kind for m in both.modules] == ["hiwi-bias"] * 4 + ["lnfit"] * 4
    assert {m.scale for m in both.modules} == {1.0}
    assert structure_of(base, "pooler-bias").modules == (ModuleSpec("bitfit", "bert.pooler.dense"),)


def test_a_preset_named_twice_counts_once() -> None:
    base = backbone("bert")
    assert structure_of(base, "lnfit + lnfit") == structure_of(base, "lnfit")


def test_key_biases_are_left_out_since_they_change_nothing() -> None:
    base = backbone("bert")
    targets = {m.target.rpartition(".")[2] for m in structure_of(base, "bitfit").modules}
    assert targets == {"query", "value", "dense"}


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(StructureError, match=r"'none' or of added-bias, .*got 'prefix'"):
        structure_of(backbone("bert"), "lnfit+prefix")


def test_a_preset_that_finds_nothing_is_refused_and_not_left_out_in_silence() -> None:
    with pytest.raises(StructureError, match="'hiwi-bias' finds nothing to act on"):
        structure_of(backbone("llama"), "hiwi-bias")


def test_every_preset_is_of_a_known_kind() -> None:
    assert {kind for kind, _ in PRESETS.values()} == set(KINDS)


def test_a_structure_of_another_backbone_is_refused_by_the_name_of_its_target() -> None:
    base = backbone("bert")
    with pytest.raises(StructureError, match=r"'bitfit' module acts on 'roberta\.x'.*no position"):
        PetModel(base, None, Structure((ModuleSpec("bitfit", "roberta.x"),)), seed=0)
    norm = "bert.encoder.layer.0.output.LayerNorm"
    with pytest.raises(StructureError, match=r"must act on one of conv1d, linear.*of kind norm"):
        PetModel(base, None, Structure((ModuleSpec("lora", norm, 2),)), seed=0)


def test_two_holders_of_one_bias_are_refused() -> None:
    base = backbone("bert")
    norm = "bert.encoder.layer.0.output.LayerNorm"
    twice = Structure((ModuleSpec("bitfit", norm), ModuleSpec("ln-bias", norm)))
    with pytest.raises(StructureError, match="one module may hold a bias"):
        PetModel(base, None, twice, seed=0)
