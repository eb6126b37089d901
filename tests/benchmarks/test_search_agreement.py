"""Agreement of searches, and gates that foretell gains: figures, and one small measurement."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from architectures import backbone
from tiny import make_backbone, make_experiment, make_rows

from benchmarks.search_agreement import agreement, drawn_evenly, jaccard, main, spearman
from fedpet.config import SearchConfig
from fedpet.pet.structure import Structure
from fedpet.search import Space, build_space, reproducible_settings


@pytest.fixture(scope="module")
def space() -> Space:
    return build_space(backbone("bert").model, "joint", block=16, blocks=2)


def test_searches_that_found_the_same_agree_wholly_and_others_less(space: Space) -> None:
    alpha = np.random.default_rng(0).normal(size=len(space.candidates))
    alike = agreement(space, np.stack([alpha, alpha + 3.0, 2.0 * alpha]), 700)
    assert alike["mean of 1"] == {"jaccard": 1.0, "pairs": 3}
    assert alike["rank correlation of alpha"] == 1.0
    noise = np.random.default_rng(1).normal(size=(4, len(space.candidates)))
    apart = agreement(space, noise, 700)
    assert apart["mean of 1"]["jaccard"] < 0.6
    assert apart["mean of 2"]["pairs"] == 3  # of four searches, none in both
    assert 0 < apart["random"]["jaccard"] < 0.6


def test_what_two_choices_share_is_counted_in_values(space: Space) -> None:
    large = max(range(len(space.sizes)), key=space.sizes.__getitem__)
    small = min(range(len(space.sizes)), key=space.sizes.__getitem__)
    shared = space.sizes[large] / (space.sizes[large] + space.sizes[small])
    assert jaccard(space, [large, small], [large]) == pytest.approx(shared)
    assert jaccard(space, [], []) == 0.0


def test_ranks_alone_count() -> None:
    assert spearman([1, 2, 3, 4], [1, 10, 100, 1000]) == 1.0
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == -1.0


def test_candidates_are_drawn_from_every_kind(space: Space) -> None:
    kinds = {candidate.spec.kind for candidate in space.candidates}
    drawn = drawn_evenly(space, len(kinds), seed=0)
    assert {space.candidates[index].spec.kind for index in drawn} == kinds
    assert drawn == drawn_evenly(space, len(kinds), seed=0)


def small_job(folder: Path, **search: object) -> Path:
    """An experiment's file over a small model and rows."""
    experiment = make_experiment(
        make_backbone(folder / "model"), make_rows(folder / "rows"), folder / "run", **search
    )
    file = folder / "small.toml"
    file.write_text(tomli_w.dumps(experiment.to_tables()))
    return file


SEARCH = {
    "search_space": "joint", "search_mask_block": 16, "search_mask_blocks": 2,
    "search_budget": 700, "search_max_steps": 2, "search_batch_size": 4,
}  # fmt: skip


def test_a_measurement_is_kept_as_it_goes_and_gone_on_with(tmp_path: Path) -> None:
    file = small_job(tmp_path, **SEARCH)
    out = tmp_path / "found.json"
    asked = [str(file), "--rows", "train", "--steps", "2", "--out", str(out)]
    assert main([*asked, "--searches", "2", "--alone", "3"]) == 0
    first = json.loads(out.read_text())
    assert len(first["searches"]) == 2
    assert len(first["alone"]) == 3
    assert main([*asked, "--searches", "3", "--alone", "4"]) == 0
    second = json.loads(out.read_text())
    assert second["searches"][:2] == first["searches"]
    assert [e["gain"] for e in first["alone"]] == [e["gain"] for e in second["alone"][:3]]
    assert set(second["correlation"]) >= {"all", "per value", "mean gain by kind"}
    assert main([*asked, "--rows", "test", "--searches", "3"]) == 2


def test_a_structure_s_file_says_how_to_search_it_again(tmp_path: Path) -> None:
    file = small_job(tmp_path, search_budget=100, search_max_steps=1, search_batch_size=4)
    settings = replace(
        SearchConfig(), space="joint", mask_block=16, mask_blocks=2, budget=300.0, max_steps=2,
        batch_size=4, split="clients", kinds=("mask", "lnfit"),
    )  # fmt: skip
    made = Structure(provenance={"settings": reproducible_settings(settings)})
    (tmp_path / "structure.json").write_text(made.to_json())
    out = tmp_path / "found.json"
    asked = [str(file), "--like", str(tmp_path / "structure.json"), "--rows", "train"]
    more = ["--searches", "2", "--alone", "2", "--steps", "1", "--out", str(out)]
    assert main([*asked, *more]) == 0
    found = json.loads(out.read_text())
    assert found["asked"]["search"]["budget"] == 300
    assert found["asked"]["search"]["split"] == "clients"
    assert set(found["correlation"]["mean gain by kind"]) == {"mask", "lnfit"}
