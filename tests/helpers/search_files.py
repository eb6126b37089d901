"""`fedpet search` on a tiny backbone: an experiment's file, the command, a search's own file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

from fedpet.cli import main
from fedpet.config import Experiment
from fedpet.pet.structure import Structure
from fedpet.run import central_search
from fedpet.run.progress import SearchBar

BUDGET = 600
SEARCH = (
    "search.epochs=2",
    "search.batch-size=8",
    "search.evaluate-every=3",
    "search.learning-rate=0.01",
)

Search = Callable[..., Structure]


def make_files(folder: Path) -> tuple[Path, Path]:
    """A backbone, and the folder of a few rows."""
    rows = tiny.make_rows(folder / "rows", clients=4, rows_per_client=16)
    return tiny.make_backbone(folder / "backbone"), rows


def write_experiment(backbone: Path, rows: Path, folder: Path) -> Path:
    """An experiment's file; its rows have no column named as its clients'."""
    file = folder / "small.toml"
    file.write_text(
        f"""
[run]
name = "small"
cache = "{folder / "cache"}"
[backbone]
model = "{backbone}"
[data]
source = "{rows}"
max-length = 16
[clients]
client-column = "nobody"
[mask]
enabled = false
[search]
budget = {BUDGET}
"""
    )
    return file


def arguments(experiment: Path, out: Path, *sets: str) -> list[str]:
    keys = [part for key in (*SEARCH, *sets) for part in ("--set", key)]
    return ["fedpet", "search", str(experiment), *keys, "--out", str(out)]


def search_once(experiment: Path, out: Path) -> Path:
    """The file of an uninterrupted search."""
    settings = Experiment.from_file(experiment, SEARCH)
    with SearchBar() as progress:
        central_search.search_centrally(settings, out, progress)
    return out


def search_by_command(
    monkeypatch: pytest.MonkeyPatch, experiment: Path, out: Path, *sets: str
) -> Structure:
    """Run the command and read its file; the last of the arguments is the file."""
    monkeypatch.setattr(sys, "argv", arguments(experiment, out, *sets))
    main.main()
    return Structure.from_json(out.read_text(encoding="utf-8"))
