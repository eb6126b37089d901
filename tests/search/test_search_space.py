"""The spaces: the paper's counts from a configuration alone, and sizes that are what is sent."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from test_search_gates import CASES

from fedpet.backbone.pretrained import Backbone, load_backbone
from fedpet.config import BackboneConfig, SearchConfig
from fedpet.errors import ConfigError, StructureError
from fedpet.pet.model import PetModel
from fedpet.pet.structure import Structure
from fedpet.search import (
    SPACES,
    Space,
    budget_values,
    build_space,
    deviations,
    random_structure,
    reproducible_settings,
    space_for,
)

KINDS = {
    "LoRA": "lora-factors",
    "BitFit": "bitfit",
    "LNFit": "lnfit",
    "LowRankAdapter": "lowrank-adapter",
}


def space_of_config(
    config: Any, name: str = "mergeable", *, rank: int = 1, scale: float = 16.0
) -> Space:
    """Count a space from a configuration alone, on torch's meta device."""
    from transformers import AutoModel, AutoModelForSequenceClassification

    with torch.device("meta"):
        try:
            model = AutoModelForSequenceClassification.from_config(config)
        except ValueError:  # an architecture that has none
            model = AutoModel.from_config(config)
    return build_space(model, name, rank=rank, scale=scale)


def load(folder: Path) -> Backbone:
    return load_backbone(BackboneConfig(model=str(folder)), num_outputs=2)


@pytest.fixture(scope="module")
def t5_large() -> dict[str, Space]:
    from transformers import T5Config

    given = CASES["C1"]["inputs"]
    config = T5Config(
        vocab_size=given["vocab_after_resize"],
        d_model=given["d_model"],
        d_kv=64,
        d_ff=given["d_ff"],
        num_layers=given["enc_layers"],
        num_decoder_layers=given["dec_layers"],
        num_heads=given["inner"] // 64,
    )
    return {name: space_of_config(config, name) for name in ("s3pet-mix", "s3pet-lora")}


@pytest.mark.timeout(600)
def test_t5_large_has_the_paper_s_candidates_without_any_weights(
    t5_large: dict[str, Space],
) -> None:
    expected, mix = CASES["C1"]["expected"], t5_large["s3pet-mix"]
    counts = Counter(candidate.spec.kind for candidate in mix.candidates)
    values: Counter[str] = Counter()
    for candidate in mix.candidates:
        values[candidate.spec.kind] += candidate.size
    assert len(mix.candidates) == expected["count_mix"] == 916
    assert mix.num_values == expected["total_params_mix"] == 1_881_088
    assert counts == {KINDS[k]: v for k, v in expected["count_by_type_mix"].items()}
    assert values == {KINDS[k]: v for k, v in expected["params_by_type_mix"].items()}
    assert len(t5_large["s3pet-lora"].candidates) == expected["count_lora_only"] == 288
    assert t5_large["s3pet-lora"].num_values == expected["total_params_lora_only"] == 884_736


@pytest.mark.timeout(600)
def test_each_candidate_of_t5_large_has_the_paper_s_size(t5_large: dict[str, Space]) -> None:
    per = CASES["C1"]["expected"]["per_candidate"]
    sizes = {
        f"{c.position.stack}.{c.position.layer}.{c.position.role}.{c.spec.kind}": c.size
        for c in t5_large["s3pet-mix"].candidates
    }
    assert sizes["encoder.0.query.lora-factors"] == per["lora_qkvo"]
    assert sizes["decoder.23.ffn-up.lora-factors"] == per["lora_wi_or_wo"]
    assert sizes["encoder.3.value.bitfit"] == per["bitfit_qkvo"]
    assert sizes["encoder.3.ffn-up.bitfit"] == per["bitfit_wi"]
    assert sizes["encoder.3.ffn-down.bitfit"] == per["bitfit_wo"]
    assert sizes["decoder.3.cross-attention-norm.bitfit"] == per["bitfit_ln"]
    assert sizes["decoder.None.final-norm.lnfit"] == per["lnfit"]
    assert sizes["encoder.5.self-attention.lowrank-adapter"] == per["lowrank_adapter"]


def test_the_released_structures_weigh_what_their_counts_say() -> None:
    per = CASES["C1"]["expected"]["per_candidate"]
    for structure in CASES["C1"]["expected"]["released_structures"]:
        weight = sum(per[kind] * count for kind, count in structure["chosen"].items())
        assert weight == structure["params"]


@pytest.mark.parametrize("name", sorted({*SPACES} - {"joint"}))  # that: test_search_joint.py
def test_a_candidate_s_size_is_what_its_module_sends(name: str, folder: Path) -> None:
    backbone = load(folder)
    space = build_space(backbone.model, name, head=backbone.head, rank=2)
    sent = {
        (s.kind, s.name): s.size for s in PetModel(backbone, None, Structure(), seed=0).segments
    }
    assert {kind for kind, _ in sent} == {"head"}
    pet = PetModel(load(folder), None, space.structure(), seed=0)
    sent = {(s.kind, s.name): s.size for s in pet.segments}
    for candidate in space.candidates:
        key = (candidate.spec.kind, candidate.spec.target)
        if key in sent:
            assert sent[key] == candidate.size
        else:  # sent with the BitFit on the same bias
            assert candidate.spec.kind == "hiwi-bias"
            assert sent["bitfit", candidate.spec.target] == candidate.size
    total = sum(dict(zip(space.tensors, space.sizes, strict=True)).values())
    assert total == sum(size for (kind, _), size in sent.items() if kind != "head")


def test_nothing_in_the_mergeable_space_stays_in_the_model(folder: Path) -> None:
    backbone = load(folder)
    space = build_space(backbone.model, head=backbone.head)
    pet = PetModel(backbone, None, space.structure(), seed=0)
    assert pet.added_parameters == ()
    assert pet.inexact_kinds == ()


def test_a_random_structure_keeps_the_budget_in_what_its_model_sends(folder: Path) -> None:
    for seed in range(3):
        backbone = load(folder)
        space = build_space(backbone.model, head=backbone.head)
        structure = random_structure(space, 500, seed=seed)
        pet = PetModel(backbone, None, structure, seed=0)
        sent = sum(segment.size for segment in pet.segments if segment.kind != "head")
        assert sent == structure.provenance["values"]
        assert 400 < sent <= 500


def test_a_budget_that_holds_nothing_or_everything_is_refused_with_the_bound(folder: Path) -> None:
    backbone = load(folder)
    space = build_space(backbone.model, head=backbone.head)
    with pytest.raises(StructureError, match="smallest candidate of 'mergeable', 32 values"):
        random_structure(space, 31, seed=0)
    with pytest.raises(StructureError, match=f"below the {space.num_values} values"):
        random_structure(space, space.num_values, seed=0)
    with pytest.raises(ConfigError, match="joint, mergeable, s3pet-mix, s3pet-lora, got 'all'"):
        build_space(backbone.model, "all")


@pytest.mark.parametrize("name", ["mergeable", "joint", "s3pet-mix"])
def test_a_space_of_some_kinds_has_all_candidates_of_those_and_no_other(
    folder: Path, name: str
) -> None:
    backbone = load(folder)
    kinds = ("lnfit", "bitfit")
    whole = space_for(SearchConfig(space=name), backbone.model, head=backbone.head)
    some = space_for(SearchConfig(space=name, kinds=kinds), backbone.model, head=backbone.head)
    assert {one.spec.kind for one in some.candidates} == set(kinds)
    assert list(some.candidates) == [one for one in whole.candidates if one.spec.kind in kinds]


def test_a_kind_that_is_unknown_or_that_a_space_lacks_is_refused(folder: Path) -> None:
    backbone = load(folder)
    with pytest.raises(ConfigError, match=r"search\.kinds must be one of .* Did you mean 'lnfit'"):
        SearchConfig(kinds=("lnfi",))
    with pytest.raises(StructureError, match="'s3pet-lora' has no candidate of bitfit, lnfit"):
        build_space(backbone.model, "s3pet-lora", head=backbone.head, kinds=("lnfit", "bitfit"))


def test_a_search_of_some_kinds_says_so() -> None:
    found = SearchConfig(kinds=("lnfit", "ln-bias"))
    assert "candidates of lnfit, ln-bias alone" in deviations(found)
    assert reproducible_settings(found)["kinds"] == ["lnfit", "ln-bias"]


def test_a_structure_of_another_backbone_is_refused_by_its_fingerprint() -> None:
    structure = Structure(fingerprint="a" * 64)
    with pytest.raises(StructureError, match=r"found on the checkpoint aaaaaaaaaaaa, .* bbbb"):
        structure.check_backbone("b" * 64)
    structure.check_backbone("a" * 64)
    Structure().check_backbone("b" * 64)


def test_a_structure_file_of_a_newer_schema_is_refused() -> None:
    with pytest.raises(StructureError, match=r"schema 2: it was written by a newer fedpet"):
        Structure.from_json('{"schema": 2, "modules": []}')


@pytest.mark.parametrize(
    ("text", "values"), [("2000", 2000), ("0.0001", 2271), ("8kB", 2000), ("1 KiB", 256)]
)
def test_a_budget_is_read_as_values_a_fraction_or_bytes(text: str, values: int) -> None:
    assert budget_values(text, backbone_parameters=22_713_216) == values


@pytest.mark.parametrize("text", ["", "0", "-3", "much", "3 pounds", "1e999", "nan"])
def test_a_budget_that_is_none_of_the_three_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"number of values \(2000\), a fraction"):
        budget_values(text, backbone_parameters=1000)
