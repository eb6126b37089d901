"""Lay out the gates of a search as a heat map: the probability of each kind at each place.

In:  a structure that a search left, with the gates of all its candidates.
Out: a Rich table for the terminal and an HTML table for a page: rows are roles and kinds, columns
     layers, numbers are percent, the chosen ones are marked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from fedpet.pet.structure import Structure
from fedpet.utils.formatting import format_bytes

__all__ = ["Gate", "GateMap", "gate_map", "structure_table"]

MARK = "*"
# Text and background by gate, light to dark: both are set, so that any terminal's theme reads.
_SHADES = (
    (0.75, "white on color(19)"),
    (0.5, "white on color(25)"),
    (0.25, "black on color(75)"),
    (0.1, "black on color(153)"),
)
_CELL = 5  # columns a layer takes in the terminal


@dataclass(frozen=True)
class Gate:
    """One candidate."""

    probability: float
    chosen: bool
    size: int  # values it sends
    target: str


@dataclass(frozen=True)
class GateMap:
    """Gates by (row, layer); both in the order of the model."""

    rows: tuple[str, ...]  # "query lora"
    layers: tuple[str, ...]
    cells: dict[tuple[str, str], Gate]


def gate_map(structure: Structure) -> GateMap | None:
    """Return the map of a searched structure; None where not all gates are known."""
    candidates = structure.provenance.get("candidates")
    if not (structure.gates or structure.mask) or not isinstance(candidates, list):
        return None
    chosen = {(spec.kind, spec.target) for spec in structure.modules}
    if structure.mask is not None:
        chosen |= {("mask", name.removesuffix(".weight")) for name in structure.mask.entries}
    stacks = set()
    found: list[tuple[str, str, str, Gate]] = []  # role, kind, layer, gate
    try:
        stacks = {str(c["stack"]) for c in candidates}
        for c in candidates:
            layer = "–" if c["layer"] is None else str(int(c["layer"]))
            role = str(c["role"])
            if len(stacks) > 1:
                role = f"{c['stack']} {role}"
            target, kind = str(c["target"]), str(c["kind"])
            gate = Gate(float(c["gate"]), (kind, target) in chosen, int(c["size"]), target)
            found.append((role, kind, layer, gate))
    except (KeyError, TypeError, ValueError):
        return None  # not as this version writes it: no picture is better than a wrong one
    rows: dict[str, None] = {}
    for wanted in dict.fromkeys(role for role, *_ in found):
        rows |= {f"{role} {kind}": None for role, kind, *_ in found if role == wanted}
    layers = sorted({layer for _, _, layer, _ in found}, key=lambda x: (x == "–", x.zfill(6)))
    cells: dict[tuple[str, str], Gate] = {}
    for role, kind, layer, gate in found:
        key = f"{role} {kind}", layer
        if kind == "mask" and key in cells:  # blocks of one weight: their mean
            cells[key] = _joined(cells[key], gate)
        elif key not in cells or gate.probability > cells[key].probability:
            cells[key] = gate
    return GateMap(tuple(rows), tuple(layers), cells)


def _joined(one: Gate, other: Gate) -> Gate:
    """Join stretches of one weight: their values together, the mean of their probabilities."""
    size = one.size + other.size
    mean = (one.probability * one.size + other.probability * other.size) / size
    return Gate(mean, one.chosen, size, one.target)


def structure_table(structure: Structure) -> RenderableType:
    """Show a structure in the terminal: a few figures, and the heat map of its gates."""
    return _Found(structure)


@dataclass(frozen=True)
class _Found:
    structure: Structure

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        facts = Table(box=box.SIMPLE, show_edge=False, show_header=False, pad_edge=False)
        facts.add_column(style="cyan", no_wrap=True)
        facts.add_column(overflow="fold")
        for name, value in structure_facts(self.structure):
            facts.add_row(Text(name), Text(value))
        yield facts
        found = gate_map(self.structure)
        if found is None:
            return
        label = max(len(row) for row in found.rows)
        at_once = max(1, (options.max_width - label - 1) // _CELL)
        yield Text("")
        yield Text(f"gates in percent, by layer; {MARK} is chosen", style="bold")
        for start in range(0, len(found.layers), at_once):
            yield _band(found, found.layers[start : start + at_once], label)


def structure_facts(structure: Structure) -> Iterator[tuple[str, str]]:
    """Method, space, budget, what was chosen and on what: for a terminal and for a page."""
    origin: dict[str, Any] = dict(structure.provenance)
    yield "method", str(origin.get("presets") or origin.get("method") or "not told")
    space = origin.get("space")
    if isinstance(space, dict):
        yield "space", f"{space.get('name')}, {space.get('values'):,} values"
    if "values" in origin:
        masked = ""
        if structure.mask is not None:
            entries = structure.mask
            masked = (
                f"{entries.num_values:,} entries of {len(entries.entries)} weights (mask, "
                f"{entries.rule}), "
            )
        yield (
            "chosen",
            f"{masked}{len(structure.modules)} modules, {origin['values']:,} of "
            f"{origin.get('budget'):,} values; the head is not counted",
        )
    kinds: dict[str, int] = {}
    for spec in structure.modules:
        kinds[spec.kind] = kinds.get(spec.kind, 0) + 1
    yield "kinds", ", ".join(f"{kind} {count}" for kind, count in kinds.items())
    checkpoint = origin.get("checkpoint")
    if isinstance(checkpoint, dict):
        scores = [f"{k} {v:.4f}" for k, v in checkpoint.items() if k not in ("step", "of")]
        yield (
            "checkpoint",
            f"step {checkpoint.get('step')} of {checkpoint.get('of')}, validation "
            + ", ".join(scores),
        )
    search = origin.get("search")
    if isinstance(search, dict):
        sent = sum(search.get(name, 0) for name in ("uplink_bytes", "downlink_bytes", "plan_bytes"))
        yield (
            "searched in",
            f"{search.get('rounds')} rounds of at most {search.get('of')} on "
            f"{search.get('clients'):,} clients, ended: {search.get('ended')}; "
            f"{format_bytes(sent)} "
            "up and down",
        )
    data = origin.get("data")
    if isinstance(data, dict):
        yield "found on", f"{data.get('rows'):,} rows of {data.get('source')}"


def _band(found: GateMap, layers: tuple[str, ...], label: int) -> Table:
    table = Table(box=None, show_edge=False, pad_edge=False, padding=0, header_style="none")
    table.add_column("", style="cyan", no_wrap=True, width=label + 1)
    for layer in layers:
        table.add_column(f"{layer:>3} ", no_wrap=True, width=_CELL)
    for row in found.rows:
        cells = [found.cells.get((row, layer)) for layer in layers]
        if any(cell is not None for cell in cells):
            table.add_row(Text(row), *map(_cell, cells))
    return table


def _cell(gate: Gate | None) -> Text:
    if gate is None:
        return Text("")
    shade = next((style for least, style in _SHADES if gate.probability >= least), "")
    text = f"{100 * gate.probability:3.0f}{MARK if gate.chosen else ' '}"
    style = f"bold {shade}".strip() if gate.chosen else shade
    return Text(text, style=style)
