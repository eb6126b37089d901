"""Test the places that a run trains: read off its plan, or left out aloud."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from html_reader import Reader
from report_runs import FULL, make_result

from fedpet.config import BackboneConfig, Experiment, MaskConfig, StructureConfig
from fedpet.report.loading import read_report
from fedpet.report.number_format import show_percent
from fedpet.report.page import page
from fedpet.report.placement import find_places


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    BertModel(
        BertConfig(
            vocab_size=50,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=16,
        )
    ).save_pretrained(folder)
    return folder


def leave_plan(run: Path, checkpoint: Path, *, broadcast: str) -> None:
    """Put a real plan, its configuration and the model's shape into a run folder."""
    import tomli_w

    from fedpet.backbone.module_roles import find_target_modules
    from fedpet.backbone.pretrained import load_backbone
    from fedpet.data import Task
    from fedpet.pet.structure import preset
    from fedpet.protocol.plan import Plan

    experiment = replace(
        Experiment(),
        backbone=BackboneConfig(model=str(checkpoint)),
        mask=MaskConfig(density=0.05, broadcast=broadcast),
        structure=StructureConfig(preset="lnfit+bitfit"),
    )
    backbone = load_backbone(experiment.backbone, num_outputs=2)
    structure = preset(
        "lnfit+bitfit", find_target_modules(backbone.model, backbone.head), rank=1, scale=1.0
    )
    task = Task("classification", ("bad", "good"), "accuracy")
    plan, pet = Plan.for_training(experiment, backbone, structure, task, "0" * 64)
    (run / "plan.bin").write_bytes(plan.to_bytes())
    (run / "config.toml").write_text(tomli_w.dumps(experiment.to_tables()), encoding="utf-8")
    pet.model.config.save_pretrained(run / "model")


def forget_checkpoint(run: Path, checkpoint: Path) -> None:
    """As if the run had come from another machine."""
    config = run / "config.toml"
    text = config.read_text(encoding="utf-8").replace(str(checkpoint), "an/absent-model")
    config.write_text(text, encoding="utf-8")


def test_a_derived_mask_is_built_again_from_the_checkpoint(
    tmp_path: Path, checkpoint: Path
) -> None:
    make_result(tmp_path)
    leave_plan(tmp_path, checkpoint, broadcast="recompute")
    places = find_places(tmp_path)
    assert places.mask is not None
    cells = places.mask.cells.values()
    assert len(cells) == 3 * 6 + 1  # six matrices a layer, and the pooler
    entries = 3 * (4 * 32 * 32 + 2 * 32 * 64) + 32 * 32
    assert sum(cell.entries for cell in cells) == entries
    assert sum(cell.chosen for cell in cells) == int(0.05 * entries)
    kinds = [kind for cell in places.structure.cells.values() for kind in cell.modules]
    assert kinds.count("lnfit") == 3 * 2  # two norms a layer
    assert kinds.count("bitfit") == 3 * 5  # all biases but those of the keys

    density, structure = re.findall(
        r'<table class="heat">.*?</table>', page(read_report(tmp_path)), flags=re.DOTALL
    )
    for (layer, role), cell in places.mask.cells.items():
        words = f"{layer}, {role}: {cell.chosen:,} of {cell.entries:,} entries"
        assert f'title="{words}">{show_percent(cell.chosen / cell.entries)}<' in density
    assert structure.count("lnfit</td>") == 6


def test_an_explicit_mask_needs_no_checkpoint(tmp_path: Path, checkpoint: Path) -> None:
    leave_plan(tmp_path, checkpoint, broadcast="send")
    with_checkpoint = find_places(tmp_path)
    forget_checkpoint(tmp_path, checkpoint)
    assert find_places(tmp_path) == with_checkpoint


def test_a_derived_mask_without_its_checkpoint_is_left_out_aloud(
    tmp_path: Path, checkpoint: Path
) -> None:
    make_result(tmp_path)
    leave_plan(tmp_path, checkpoint, broadcast="recompute")
    forget_checkpoint(tmp_path, checkpoint)
    places = find_places(tmp_path)
    assert places.mask is None
    assert places.structure.cells  # which needs the model's shape alone
    words = Reader(page(read_report(tmp_path))).text
    assert "not shown: the checkpoint 'an/absent-model' is not on this machine" in words


def test_a_mask_of_another_checkpoint_is_left_out_aloud(tmp_path: Path, checkpoint: Path) -> None:
    import torch
    from transformers import BertModel

    leave_plan(tmp_path, checkpoint, broadcast="recompute")
    model = BertModel.from_pretrained(checkpoint)
    with torch.no_grad():
        model.pooler.dense.bias.add_(1)
    model.save_pretrained(tmp_path / "other")
    config = tmp_path / "config.toml"
    text = config.read_text(encoding="utf-8").replace(str(checkpoint), str(tmp_path / "other"))
    config.write_text(text, encoding="utf-8")
    places = find_places(tmp_path)
    assert places.mask is None
    assert "the run's was" in places.left_out


def test_a_run_without_a_plan_says_so(tmp_path: Path) -> None:
    make_result(tmp_path / "full", method="full", values=FULL)
    assert "not shown: the run has no plan" in Reader(page(read_report(tmp_path / "full"))).text
