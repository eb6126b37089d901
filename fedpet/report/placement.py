"""Where a run trained: the mask's density and the structure's modules, by layer and role.

    ... -> codec -> plan -> ... -> [report]

In:  a run folder's `plan.bin` and `config.toml`, and the checkpoint where it is at hand.
Out: two grids of cells, layers down and roles across, and a sentence where one is left out.

An explicit mask travels in the plan; a derived one is built again, which takes the checkpoint.
Nothing is downloaded for a report.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from fedpet.backbone.module_roles import Position, find_target_modules, maskable_weights
from fedpet.config import BackboneConfig, Experiment
from fedpet.errors import BackboneError, FedpetError
from fedpet.pet.mask import Mask
from fedpet.pet.modules.registry import KINDS
from fedpet.pet.structure import Structure
from fedpet.protocol.plan import Plan

if TYPE_CHECKING:
    from fedpet.backbone.pretrained import Backbone

__all__ = ["Cell", "Grid", "Places", "find_places"]


@dataclass
class Cell:
    """What lies at one layer and role."""

    entries: int = 0  # in the mask's scope
    chosen: int = 0
    modules: list[str] = field(default_factory=list)  # kinds of the structure's modules
    gates: list[float] = field(default_factory=list)  # of a search


@dataclass
class Grid:
    """Cells by (layer, role); `layers` and `roles` in the order of the model."""

    layers: list[str] = field(default_factory=list)
    roles: list[str] = field(default_factory=list)
    cells: dict[tuple[str, str], Cell] = field(default_factory=dict)

    def at(self, layer: str, role: str) -> Cell:
        """The cell, made where there is none yet."""
        if layer not in self.layers:
            self.layers.append(layer)
        if role not in self.roles:
            self.roles.append(role)
        return self.cells.setdefault((layer, role), Cell())


@dataclass(frozen=True)
class Places:
    """Both grids of a run; `mask` is None where it has none or it is left out."""

    mask: Grid | None
    structure: Grid
    left_out: str  # why the mask is not shown, or empty


def find_places(folder: Path) -> Places:
    """Read a run folder's plan and place its parts in the model.

    Raises:
        FedpetError: The plan or the configuration does not read.
    """
    plan = Plan.from_bytes((folder / "plan.bin").read_bytes())
    experiment = Experiment.of_run(folder)
    backbone, why = _checkpoint_at_hand(experiment.backbone, plan)
    model: nn.Module | None = backbone.model if backbone is not None else _shape(folder)
    whole = _structure(folder, plan)
    if model is None:
        return Places(None, _structure_grid(whole, []), why)
    head = backbone.head if backbone is not None else ()
    positions = find_target_modules(model, head)
    structure = _structure_grid(whole, positions)
    if plan.mask is None:
        return Places(None, structure, "the weights were not masked")
    try:
        if backbone is not None:
            sizes = {name: weight.numel() for name, weight in maskable_weights(model, head).items()}
            segments = plan.build(backbone).segments
            chosen = {s.name: s.size for s in segments if s.kind == "mask"}
        elif plan.mask_positions:
            sizes, chosen = _explicit(plan, model)
        else:
            return Places(None, structure, why)
    except FedpetError as error:
        return Places(None, structure, str(error))
    return Places(_mask_grid(sizes, chosen, positions), structure, "")


def _checkpoint_at_hand(config: BackboneConfig, plan: Plan) -> tuple[Backbone | None, str]:
    """Load the run's own checkpoint if it lies on this machine, else say why not."""
    from fedpet.backbone.pretrained import load_for_task

    try:
        source = config.model
        if not (source == "bundled" or source.startswith("package:") or Path(source).exists()):
            source = _cached(config)
        own = dataclasses.replace(config, model=source)
        backbone = load_for_task(plan.backbone(own), plan.task)
    except FedpetError as error:
        return None, str(error)
    if backbone.fingerprint != plan.fingerprint:
        return None, (
            f"the checkpoint {config.model!r} here is {backbone.fingerprint:.16}, the run's was "
            f"{plan.fingerprint:.16}"
        )
    return backbone, ""


def _cached(config: BackboneConfig) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return str(
            snapshot_download(config.model, revision=config.revision or None, local_files_only=True)
        )
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        raise BackboneError(f"the checkpoint {config.model!r} is not on this machine") from None


def _shape(folder: Path) -> nn.Module | None:
    """The run's model without its weights, from the plain model it left."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    if not (folder / "model" / "config.json").is_file():
        return None
    try:
        config = AutoConfig.from_pretrained(folder / "model")
        with torch.device("meta"):
            model: nn.Module = AutoModelForSequenceClassification.from_config(config)
    except (OSError, ValueError, KeyError, RuntimeError):
        return None
    return model


def _explicit(plan: Plan, model: nn.Module) -> tuple[dict[str, int], dict[str, int]]:
    """Sizes and counts of an explicit mask, without any weights; checked by its digest."""
    from fedpet.codec.index_coding import decode_positions
    from fedpet.errors import PlanError

    sizes = {name: weight.numel() for name, weight in sorted(maskable_weights(model).items())}
    coded = decode_positions(plan.mask_positions, list(sizes.values()))
    mask = Mask(
        {
            name: torch.from_numpy(chosen.astype(np.int64))
            for name, chosen in zip(sizes, coded, strict=True)
            if len(chosen)
        },
        sizes,
    )
    if mask.digest().hex() != plan.mask_sha256:
        raise PlanError("its tensors are told apart by the checkpoint alone, which is not here")
    return sizes, {name: len(chosen) for name, chosen in mask.positions.items()}


def _mask_grid(
    sizes: Mapping[str, int], chosen: Mapping[str, int], positions: tuple[Position, ...]
) -> Grid:
    grid = Grid()
    for position in positions:
        name = f"{position.name}.weight"
        if position.kind in ("linear", "conv1d") and name in sizes:
            cell = grid.at(*_place(position, positions))
            cell.entries += sizes[name]
            cell.chosen += chosen.get(name, 0)
    return grid


def _structure(folder: Path, plan: Plan) -> Structure:
    """The run's structure with its gates; the plan has none of them."""
    try:
        whole = Structure.from_json((folder / "structure.json").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, FedpetError):
        return plan.structure
    return whole if whole.modules == plan.structure.modules else plan.structure


def _structure_grid(structure: Structure, positions: tuple[Position, ...] | list[Position]) -> Grid:
    """Modules by place; a block's module stands with the block, any other with its own target."""
    grid = Grid()
    gates = structure.gates or (None,) * len(structure.modules)
    wanted: dict[str, list[tuple[str, float | None]]] = {}
    for spec, gate in zip(structure.modules, gates, strict=True):
        wanted.setdefault(spec.target, []).append((spec.kind, gate))
    for position in positions:
        for kind, gate in wanted.get(position.name, ()):
            if position.kind in KINDS[kind].targets:
                cell = grid.at(*_place(position, positions))
                cell.modules.append(kind)
                if gate is not None:
                    cell.gates.append(gate)
    return grid


def _place(position: Position, positions: tuple[Position, ...] | list[Position]) -> tuple[str, str]:
    layer = "other" if position.layer is None else str(position.layer)
    if len({other.stack for other in positions}) > 1:
        return f"{position.stack} {layer}", position.role
    return layer, position.role
