"""Manual structures: whole where the budget holds them, else from the top or of a lower rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedpet.backbone.pretrained import load_backbone
from fedpet.config import BackboneConfig
from fedpet.errors import StructureError
from fedpet.search import manual_structure


def test_a_manual_structure_is_whole_where_it_fits_and_filled_from_the_top_where_not(
    files: tuple[Path, Path],
) -> None:
    backbone = load_backbone(BackboneConfig(model=str(files[0])), num_outputs=2)
    model, head = backbone.model, backbone.head
    everything = 4 * 32  # two norms a layer; that of the embeddings is no position
    whole = manual_structure(model, "lnfit", everything, head=head)
    assert whole.provenance["whole"]
    assert whole.provenance["values"] == everything
    part = manual_structure(model, "lnfit", 3 * 32 + 31, head=head)
    assert part.provenance["values"] == 3 * 32
    assert {spec.target for spec in part.modules} < {spec.target for spec in whole.modules}
    assert sum(".layer.1." in spec.target for spec in part.modules) == 2
    with pytest.raises(StructureError, match="at least one module of 'lnfit', 32 values, got 31"):
        manual_structure(model, "lnfit", 31, head=head)


def test_a_manual_lora_takes_the_highest_rank_that_fits_and_keeps_alpha(
    files: tuple[Path, Path],
) -> None:
    backbone = load_backbone(BackboneConfig(model=str(files[0])), num_outputs=2)
    structure = manual_structure(backbone.model, "lora", 3 * 4 * 32 + 100, head=backbone.head)
    assert {(spec.rank, spec.rank * spec.scale) for spec in structure.modules} == {(3, 16.0)}
    assert structure.provenance["values"] == 3 * 4 * 32
    biases = manual_structure(backbone.model, "hiwi-bias", 10**6, head=backbone.head)
    assert {spec.rank for spec in biases.modules} == {1}  # a higher one sends no more
