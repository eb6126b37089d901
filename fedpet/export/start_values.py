"""Read the values that a run starts from, out of a saved run or a saved `PetModel`.

The values of a run count from its checkpoint, so they are taken where checkpoint, mask, structure
and layout are the run's own; and the seed, where modules are drawn from it. A head that started
elsewhere is brought to this run's start.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedpet.config import MaskConfig
from fedpet.errors import ConfigError
from fedpet.export.saved_run import SavedRun
from fedpet.pet.pet_files import CONFIG_FILE, read_pet
from fedpet.pet.structure import Structure

if TYPE_CHECKING:
    from fedpet.pet.model import PetModel
    from fedpet.protocol.plan import Plan

__all__ = ["start_values"]


def start_values(folder: Path, plan: Plan, pet: PetModel) -> np.ndarray:
    """Return the values of a saved small part, float32 (num_values,), in this run's layout.

    Args:
        folder: Of a finished run, or written by `PetModel.save_pretrained`.
        plan: Of the run that starts.
        pet: Its model.

    Raises:
        ConfigError: The folder is neither, or its values are of another checkpoint, mask or
            structure.
    """
    if not (folder / CONFIG_FILE).exists() and not (folder / "plan.bin").exists():
        raise ConfigError(
            f"run.start must be the folder of a finished run, or one that save_pretrained of a "
            f"PetModel wrote, and {str(folder)!r} is neither."
        )
    if (folder / CONFIG_FILE).exists():
        return _of_model(folder, plan, pet)
    saved = SavedRun(folder)
    theirs = saved.plan
    same = dict(
        checkpoint=theirs.fingerprint == plan.fingerprint,
        mask=theirs.mask_sha256 == plan.mask_sha256 and _same_rank(theirs.mask, plan.mask),
        structure=_specs(theirs.structure) == _specs(plan.structure),
        seed=theirs.seed == plan.seed or not _is_drawn(plan.structure),
        head=_head_of(theirs) == _head_of(plan),
        layout=theirs.layout == plan.layout,
    )
    _refuse_another(folder, same)
    return saved.values.astype(np.float32)


def _of_model(folder: Path, plan: Plan, pet: PetModel) -> np.ndarray:
    table, tensors = read_pet(folder)
    structure = Structure.from_json(json.dumps(table["structure"]))
    stored = {name: tensor for name, tensor in tensors.items() if name.startswith("delta/")}
    wanted = {f"delta/{s.kind}/{s.name}": s.size for s in pet.segments}
    starts = {name: tensors.get(f"start/{name}") for name in pet.head_starts()}
    same = dict(
        checkpoint=table["fingerprint"] == pet.fingerprint(),
        mask=_same_mask(table["mask"], tensors, pet),
        structure=_specs(structure) == _specs(plan.structure),
        seed=table["seed"] == plan.seed or not _is_drawn(plan.structure),
        head=all(
            saved is not None and saved.shape == own.shape
            for saved, own in zip(starts.values(), pet.head_starts().values(), strict=True)
        ),
        layout={name: tensor.numel() for name, tensor in stored.items()} == wanted,
    )
    _refuse_another(folder, same)
    parts = []
    for segment in pet.segments:
        part = stored[f"delta/{segment.kind}/{segment.name}"]
        if segment.kind == "head":
            there, here = starts[segment.name], pet.head_starts()[segment.name]
            assert there is not None
            part = part + (there - here.cpu()).reshape(-1)
        parts.append(part)
    values: np.ndarray = torch.cat(parts).numpy().astype(np.float32)
    return values


def _refuse_another(folder: Path, same: dict[str, bool]) -> None:
    if all(same.values()):
        return
    others = [name for name, is_same in same.items() if not is_same]
    if len(others) > 1 and "layout" in others:  # it follows from the others
        others.remove("layout")
    raise ConfigError(
        f"the values in {str(folder)!r}, which run.start names, are of another "
        f"{' and '.join(others)} than this run's: give the run the same backbone, mask, structure "
        "and run.seed, or take run.start out."
    )


def _head_of(plan: Plan) -> tuple[Any, ...]:
    return plan.head, plan.head_seed, plan.task.num_outputs, plan.task.label_names


def _specs(structure: Structure) -> set[Any]:
    return set(structure.modules)


def _is_drawn(structure: Structure) -> bool:
    """Tell whether modules have parts that are drawn from the seed and count with the values."""
    return any(spec.rank and spec.kind != "hiwi-bias" for spec in structure.modules)


def _same_rank(theirs: MaskConfig | None, ours: MaskConfig | None) -> bool:
    """Tell whether two masks rank their entries by the same rule."""
    if theirs is None or ours is None:
        return theirs is ours
    return theirs.rule == ours.rule and (ours.rule != "random" or theirs.seed == ours.seed)


def _same_mask(
    table: dict[str, Any] | None, tensors: dict[str, torch.Tensor], pet: PetModel
) -> bool:
    ours, config = pet.mask, pet.mask_config
    if table is None or ours is None:
        return table is None and ours is None
    if not table:  # positions are stored
        return all(
            f"positions/{name}" in tensors and torch.equal(tensors[f"positions/{name}"], chosen)
            for name, chosen in ours.positions.items()
        )
    deciding = ["density", "rule", "granularity"]
    if config is not None and config.rule == "random":
        deciding.append("seed")
    return config is not None and all(table.get(key) == getattr(config, key) for key in deciding)
