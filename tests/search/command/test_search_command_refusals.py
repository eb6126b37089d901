"""Test the refusals of `fedpet search`, and of structures by a run: one sentence, exit code 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from search_files import arguments

from fedpet.backbone.pretrained import load_backbone
from fedpet.config import BackboneConfig
from fedpet.run import central_search
from fedpet.search import build_space

Refused = Callable[..., str]


@pytest.fixture
def refused(refused: Refused) -> Refused:
    return lambda *command: refused(*command[1:])  # behind the program's name


def test_a_budget_that_does_not_fit_the_space_is_refused_with_the_bound(
    experiment: Path, refused: Refused, tmp_path: Path, files: tuple[Path, Path]
) -> None:
    backbone = load_backbone(BackboneConfig(model=str(files[0])), num_outputs=2)
    everything = build_space(backbone.model, head=backbone.head).num_values
    out = tmp_path / "s.json"
    said = refused(*arguments(experiment, out, "search.budget=31"))
    assert "at least the smallest candidate of 'mergeable', 32 values" in said
    assert said.endswith("Raise it, or lower the rank.")
    said = refused(*arguments(experiment, out, "search.budget=1000000"))
    assert f"must be below the {everything} values of the whole space" in said
    assert "nothing to choose" in said
    said = refused(*arguments(experiment, out, "search.budget='a lot'"))
    assert "a fraction of the backbone below 1 (0.0001)" in said
    assert "8kB" in said
    assert not out.exists()


def test_a_search_is_refused_where_its_file_stands_or_its_settings_mean_nothing(
    experiment: Path, found: Path, refused: Refused, tmp_path: Path
) -> None:
    out = tmp_path / "s.json"
    assert "is there already: name another with --out" in refused(*arguments(experiment, found))
    said = refused(*arguments(experiment, out, "search.method=magic"))
    assert "search.method must be s3pet, random, or presets" in said
    assert "mergeable, s3pet-mix" in refused(*arguments(experiment, out, "search.space=all"))
    assert "unknown key in [search]" in refused(*arguments(experiment, out, "search.buget=1"))
    state = central_search.state_file(out)
    state.write_bytes(b"of something else")
    assert "is not the state of a search" in refused(*arguments(experiment, out))


def test_a_structure_of_another_backbone_is_refused_before_anything_is_run(
    files: tuple[Path, Path], found: Path, refused: Refused, tmp_path: Path
) -> None:
    said = refused(*simulate(files, tmp_path, altered(found, tmp_path, fingerprint="ab" * 32)))
    assert "was found on the checkpoint abababababab" in said
    assert "Take that checkpoint, search again on this one, or name a preset" in said


def test_a_structure_s_file_of_a_newer_schema_or_of_nothing_is_refused(
    files: tuple[Path, Path], found: Path, refused: Refused, tmp_path: Path
) -> None:
    said = refused(*simulate(files, tmp_path, altered(found, tmp_path, schema=2)))
    assert "reads structures up to schema 1, the file has schema 2" in said
    assert "update this one" in said
    nothing = tmp_path / "nothing.json"
    assert "nothing.json" in refused(*simulate(files, tmp_path, nothing))
    nothing.write_bytes(b"\xff\xfe{")
    assert "nothing.json" in refused(*simulate(files, tmp_path, nothing))


def altered(file: Path, folder: Path, **changes: object) -> Path:
    table = json.loads(file.read_text(encoding="utf-8"))
    path = folder / "altered.json"
    path.write_text(json.dumps({**table, **changes}), encoding="utf-8")
    return path


def simulate(files: tuple[Path, Path], folder: Path, structure: Path) -> list[str]:
    keys = (
        f"backbone.model='{files[0]}'",
        f"data.source='{files[1]}'",
        f"run.cache='{folder / 'cache'}'",
        f"structure.file='{structure}'",
    )
    return ["fedpet", "simulate", *(part for key in keys for part in ("--set", key))]
