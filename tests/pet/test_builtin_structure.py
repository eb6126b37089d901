"""A built-in structure: a preset's name for the file beside an experiment."""

from __future__ import annotations

from pathlib import Path

import pytest
from architectures import backbone

from fedpet.backbone.module_roles import find_target_modules
from fedpet.config import StructureConfig
from fedpet.errors import StructureError
from fedpet.pet import structure as module
from fedpet.pet.structure import ModuleSpec, Structure, load_structure

OWN = Structure((ModuleSpec("lnfit", "bert.encoder.layer.1.output.LayerNorm"),))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "films.structure.json").write_text(OWN.to_json())
    (tmp_path / "lnfit.structure.json").write_text(OWN.to_json())
    monkeypatch.setattr(module, "experiments_folder", lambda: tmp_path)
    return tmp_path


def load(**given: str) -> Structure:
    return load_structure(StructureConfig(**given), find_target_modules(backbone("bert").model))


def test_a_preset_of_a_built_in_structure_s_name_is_read_from_its_file() -> None:
    assert load(preset="films") == OWN


def test_a_file_of_one_s_own_stands_before_it(tmp_path: Path) -> None:
    mine = Structure((ModuleSpec("ln-bias", "bert.encoder.layer.0.output.LayerNorm"),))
    (tmp_path / "mine.json").write_text(mine.to_json())
    assert load(preset="films", file=str(tmp_path / "mine.json")) == mine


def test_a_kind_s_own_name_is_never_a_file() -> None:
    assert len(load(preset="lnfit").modules) == 4


@pytest.mark.parametrize("name", ["other", "films+lnfit", "../films", "Films"])
def test_a_name_without_a_file_is_refused_as_a_preset(name: str) -> None:
    with pytest.raises(StructureError, match=r"or a built-in structure's name, got"):
        load(preset=name)


def test_a_broken_built_in_file_is_refused_with_its_path(folder: Path) -> None:
    (folder / "broken.structure.json").write_bytes(b"\xff\xfe")
    with pytest.raises(StructureError, match=r"broken\.structure\.json"):
        load(preset="broken")
