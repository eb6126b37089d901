"""`fedpet search`: what it leaves, how it goes on, and who may use the file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from search_files import (
    BUDGET,
    Search,
    arguments,
)
from tiny import Silent

from fedpet.backbone.module_roles import maskable_weights
from fedpet.backbone.pretrained import load_backbone
from fedpet.cli import main
from fedpet.config import BackboneConfig, Experiment, MaskConfig
from fedpet.pet.mask import build_mask
from fedpet.pet.model import PetModel
from fedpet.pet.structure import Structure
from fedpet.protocol.plan import Plan
from fedpet.report.placement import find_places
from fedpet.run import central_search
from fedpet.run.federate import federate, prepare
from fedpet.run.local_grid import LocalGrid
from fedpet.run.progress import SearchBar
from fedpet.run.run_folder import new_run_folder


def test_a_search_leaves_a_structure_with_its_fingerprint_budget_gates_and_origin(
    files: tuple[Path, Path], found: Path
) -> None:
    structure = Structure.from_json(found.read_text(encoding="utf-8"))
    told = structure.provenance
    backbone = load_backbone(BackboneConfig(model=str(files[0])), num_outputs=2)
    assert structure.fingerprint == backbone.fingerprint
    assert len(structure.gates) == len(structure.modules) > 0
    assert told["method"] == "s3pet"
    assert told["space"]["name"] == "mergeable"
    assert told["budget"] == told["asked_budget"] == BUDGET
    assert told["data"] == {"source": str(files[1]), "split": "train", "rows": 64}
    assert not found.with_name("structure.json.state").exists()
    pet = PetModel(backbone, None, structure, seed=0)
    sent = sum(segment.size for segment in pet.segments if segment.kind != "head")
    assert sent == told["values"] <= BUDGET


def test_mask_and_structure_together_keep_a_budget_that_holds_both(
    files: tuple[Path, Path], search: Search, tmp_path: Path
) -> None:
    both = ("mask.enabled=true", "mask.density=0.02", "search.mask-in-budget=true")
    structure = search(tmp_path / "both.json", *both)
    told = structure.provenance
    backbone = load_backbone(BackboneConfig(model=str(files[0])), num_outputs=2)
    mask = build_mask(maskable_weights(backbone.model, backbone.head), MaskConfig(density=0.02))
    pet = PetModel(backbone, mask, structure, seed=0)
    sent = {kind: 0 for kind in ("mask", "structure")}
    for segment in pet.segments:
        if segment.kind != "head":
            sent["mask" if segment.kind == "mask" else "structure"] += segment.size
    assert min(sent.values()) > 0
    assert sum(sent.values()) <= BUDGET == told["asked_budget"]
    assert told["budget"] == BUDGET - sent["mask"]
    assert told["mask_in_budget"] is True


def test_a_search_that_was_killed_goes_on_and_leaves_the_same_bytes(
    experiment: Path,
    found: Path,
    search: Search,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "again.json"
    honest = SearchBar.on_search_step

    def stop(self: SearchBar, step: Any) -> None:
        honest(self, step)
        if step.step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SearchBar, "on_search_step", stop)
        patch.setattr(sys, "argv", arguments(experiment, out))
        with pytest.raises(SystemExit) as exit_info:
            main.main()
    assert exit_info.value.code == 130
    assert "The same command goes on" in capsys.readouterr().err
    assert not out.exists()
    assert central_search.state_file(out).exists()
    search(out)
    assert "going on from step 3" in capsys.readouterr().err
    assert out.read_bytes() == found.read_bytes()


def test_a_searched_structure_trains_in_an_experiment_and_its_gates_stay_with_the_server(
    files: tuple[Path, Path], found: Path, tmp_path: Path
) -> None:
    settings = tiny.make_experiment(
        *files, tmp_path / "run", structure_file=str(found), strategy_num_rounds=1
    )
    prepared = prepare(settings, Silent())
    structure = Structure.from_json(found.read_text(encoding="utf-8"))
    assert prepared.plan.structure == Structure(structure.modules)
    folder = new_run_folder(settings)
    result = federate(LocalGrid.of(node_settings(settings), 2), prepared, folder, Silent())
    assert result["model"]["structure_values"] == structure.provenance["values"]
    kept = Structure.from_json((folder.path / "structure.json").read_text(encoding="utf-8"))
    assert kept == structure
    assert Plan.from_bytes((folder.path / "plan.bin").read_bytes()).structure.gates == ()
    cells = find_places(folder.path).structure.cells.values()
    assert sorted(g for cell in cells for g in cell.gates) == sorted(structure.gates)

    from fedpet.report.loading import read_report
    from fedpet.report.page import page

    text = page(read_report(folder.path))
    assert "Gates of the search" in text
    assert text.count('class="chosen"') == len(structure.modules)


def node_settings(settings: Experiment) -> Any:
    from fedpet.client.node_config import NodeConfig

    return NodeConfig.from_experiment(settings)


def test_random_and_manual_structures_come_under_the_same_budget_by_the_same_command(
    search: Search, tmp_path: Path
) -> None:
    by = {
        seed: search(tmp_path / f"r{seed}.json", "search.method=random", f"search.seed={seed}")
        for seed in (0, 1)
    }
    assert by[0].modules != by[1].modules
    again = search(tmp_path / "again.json", "search.method=random", "search.seed=1")
    assert again == by[1]
    manual = search(tmp_path / "manual.json", "search.method='lnfit+lora'")
    assert {spec.kind for spec in manual.modules} == {"lnfit", "lora"}
    for structure in (*by.values(), manual):
        assert 0 < structure.provenance["values"] <= BUDGET == structure.provenance["budget"]
        assert structure.fingerprint
        assert structure.gates == ()
