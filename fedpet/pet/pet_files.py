"""Write the trainables of a model to a folder of two small files, and put them on a model again.

In:  a `PetModel` and a folder; or a plain model and such a folder.
Out: `pet_model.safetensors`, a tensor a segment of the values, and `pet_config.json`, which says
     how they lie on which backbone; or a `PetModel` at the same values, to the bit.

The backbone itself is not written: a mask's positions are computed from it again, so it must be
the same one, which its fingerprint tells. A head is new with each model that is drawn, so its
start is written beside its change.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedpet import __version__
from fedpet.backbone.module_roles import maskable_weights
from fedpet.backbone.pretrained import Backbone, fingerprint
from fedpet.config import MaskConfig
from fedpet.errors import BackboneError, InputError
from fedpet.pet.mask import Mask, MaskCounts, build_mask
from fedpet.pet.structure import Structure
from fedpet.pet.trainable_model import TrainableModel, check_plain

__all__ = ["CONFIG_FILE", "VALUES_FILE", "load_pet", "read_pet", "save_pet"]

VALUES_FILE = "pet_model.safetensors"
CONFIG_FILE = "pet_config.json"
SCHEMA = 1

_Model = TypeVar("_Model", bound=TrainableModel)


def save_pet(pet: TrainableModel, folder: Path) -> None:
    """Write both files; the folder is made."""
    delta = pet.get_delta()
    tensors = {
        f"delta/{s.kind}/{s.name}": delta[s.start : s.start + s.size].clone() for s in pet.segments
    }
    tensors |= {f"start/{name}": start.cpu().clone() for name, start in pet.head_starts().items()}
    mask, config = pet.mask, pet.mask_config
    if mask is not None and config is None:
        tensors |= {f"positions/{name}": chosen for name, chosen in mask.positions.items()}
    table = {
        "schema": SCHEMA,
        "fedpet": __version__,
        "base_model": pet.source,
        "fingerprint": pet.fingerprint(),
        "mask": None if mask is None else {} if config is None else asdict(config),
        "structure": json.loads(pet.structure.to_json()),
        "head": list(pet.head),
        "modules_to_save": list(pet.head_starts()),
        "seed": pet.seed,
        "num_values": pet.num_values,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / VALUES_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def load_pet(make: Callable[..., _Model], model: nn.Module, folder: Path) -> _Model:
    """Put what `save_pet` wrote on the backbone it was made for.

    Args:
        make: The class `PetModel`.
        model: The backbone, plain; adapted in place.
        folder: Holds both files.

    Raises:
        BackboneError: Another backbone.
        InputError: The folder does not hold such files, or they do not belong together.
    """
    check_plain(model)
    table, tensors = read_pet(folder)
    parameters = dict(model.named_parameters())
    starts = _under("start/", tensors)
    found = fingerprint((n, p) for n, p in parameters.items() if n not in starts)
    if found != table["fingerprint"] or any(
        name not in parameters or parameters[name].shape != start.shape
        for name, start in starts.items()
    ):
        raise BackboneError(
            f"the trainables in {str(folder)!r} belong to the backbone {table['base_model']!r} "
            f"with the fingerprint {table['fingerprint']:.16}, and this model's is {found:.16}: "
            "load that one, with as many labels."
        )
    for name, start in starts.items():
        parameters[name].copy_(start)
    head = tuple(table["head"])
    structure = Structure.from_json(json.dumps(table["structure"]))
    mask, config = _mask(table["mask"], tensors, model, head, structure.mask)
    pet = make(
        Backbone.of_model(
            model, head, fingerprint=found, source=table["base_model"], trains_head=bool(starts)
        ),
        mask,
        structure,
        seed=table["seed"],
        mask_config=config,
    )
    for tier, segments in enumerate(pet.tiers):  # the one that was in use
        if sum(segment.size for segment in segments) == table["num_values"]:
            pet.set_tier(tier)
    parts = [tensors.pop(f"delta/{s.kind}/{s.name}", torch.empty(0)) for s in pet.segments]
    sizes = [segment.size for segment in pet.segments]
    if [part.numel() for part in parts] != sizes or _under("delta/", tensors):
        raise InputError(
            f"the files in {str(folder)!r} do not belong together: {VALUES_FILE} has other values "
            f"than {CONFIG_FILE} describes. Take both from one call of save_pretrained."
        )
    pet.set_delta(torch.cat([torch.empty(0), *parts]), seed=pet.seed)
    return pet


def read_pet(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read both files.

    Raises:
        InputError: The folder does not hold such files.
    """
    try:
        table = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if not isinstance(table, dict) or table.get("schema") != SCHEMA:
            raise ValueError(f"{CONFIG_FILE} is not of schema {SCHEMA}")
        wanted = {
            "base_model": str,
            "fingerprint": str,
            "structure": dict,
            "seed": int,
            "head": list,
        }
        for name, kind in (wanted | {"num_values": int}).items():
            if not isinstance(table.get(name), kind):
                raise ValueError(f"{CONFIG_FILE} has no {name!r}")
        table.setdefault("mask", None)
        return table, load_file(folder / VALUES_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            f"{str(folder)!r} is no folder that save_pretrained of a PetModel wrote: {error}."
        ) from None


def _mask(
    table: Mapping[str, Any] | None,
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    head: tuple[str, ...],
    counts: MaskCounts | None,
) -> tuple[Mask | None, MaskConfig | None]:
    """Return the mask, and the configuration that gives it where there is one."""
    if table is None:
        return None, None
    scope = maskable_weights(model, head)
    if not table:
        sizes = {name: weight.numel() for name, weight in scope.items()}
        return Mask(_under("positions/", tensors), sizes), None
    unknown = set(table) - {field.name for field in fields(MaskConfig)}
    if unknown:
        raise InputError(
            f"{CONFIG_FILE} names {', '.join(sorted(unknown))} of a mask, which this fedpet does "
            "not know: it was written by a newer one; update this one."
        )
    entries: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in table.items()
    }
    try:
        config = MaskConfig(**entries)
    except TypeError as error:
        raise InputError(
            f"the mask in {CONFIG_FILE} of save_pretrained reads wrong: {error}."
        ) from None
    return build_mask(scope, config, counts), config


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
