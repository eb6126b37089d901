"""The gates of a search as a heat map, in the terminal and on the page."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from search_files import Search

from fedpet.pet.structure import Structure
from fedpet.report.gate_tables import MARK, gate_map, structure_table
from fedpet.report.page import heat_html
from fedpet.report.page_parts import gate_heat


def shown(structure: Structure, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(structure_table(structure))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_the_heat_map_has_every_candidate_and_marks_the_chosen_ones(found: Path) -> None:
    structure = Structure.from_json(found.read_text(encoding="utf-8"))
    heat = gate_map(structure)
    assert heat is not None
    assert heat.layers == ("0", "1", "–")
    assert len(heat.cells) == len(structure.provenance["candidates"])
    assert sum(gate.chosen for gate in heat.cells.values()) == len(structure.modules)
    assert "ffn-up hiwi-weight" in heat.rows
    text = shown(structure, 80)
    marks = sum(line.count(MARK) for line in text.splitlines() if "chosen" not in line)
    assert marks == len(structure.modules)
    assert all(row in text for row in heat.rows)
    assert max(map(len, text.splitlines())) <= 80
    on_page = gate_heat(structure)
    assert on_page is not None
    html = heat_html(on_page)
    assert html.count("<td") - html.count('class="none"') == len(heat.cells)


def test_a_heat_map_wider_than_the_terminal_goes_on_below(found: Path) -> None:
    structure = Structure.from_json(found.read_text(encoding="utf-8"))
    heat = gate_map(structure)
    assert heat is not None
    text = shown(structure, max(map(len, heat.rows)) + 8)
    assert text.count("ffn-up lora") == 2  # one layer at a time; the third has no ffn


def test_a_structure_without_gates_has_no_heat_map(
    found: Path, search: Search, tmp_path: Path
) -> None:
    structure = search(tmp_path / "r.json", "search.method=random")
    assert gate_map(structure) is None
    assert gate_heat(structure) is None
    assert "random" in shown(structure, 80)
    searched = Structure.from_json(found.read_text(encoding="utf-8"))
    strange = replace(searched, provenance={"candidates": [{"gate": "high"}]})
    assert gate_map(strange) is None
