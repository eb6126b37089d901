"""List the small modules that act on parts of the backbone: the structure.

In:  the backbone's positions, and the names of presets ("lnfit+bitfit") or a structure's JSON file.
Out: a `Structure`: a list of `ModuleSpec`s, in the order in which their values are communicated.

A structure names kinds and targets only. It holds no values and knows no seeds, so the same file
serves every device and, with the same backbone, every data set.

Source: the kinds are those of S3PET (Hu et al., NeurIPS 2022, arXiv:2206.07382) and HiWi (Liao,
Meng and Monz, ACL 2023, arXiv:2305.16742). Ours: key biases are left out of the preset "bitfit",
since a constant added to every key leaves the softmax as it was, in every attention without
rotary or relative keys.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fedpet.backbone.module_roles import Position
from fedpet.config import StructureConfig
from fedpet.config.builtin import experiments_folder
from fedpet.errors import ConfigError, StructureError
from fedpet.pet.mask import MaskCounts
from fedpet.pet.modules.registry import KINDS, PRESETS, ModuleSpec, spec_of

__all__ = ["KINDS", "PRESETS", "ModuleSpec", "Structure", "load_structure", "preset", "spec_of"]

SCHEMA = 1


@dataclass(frozen=True)
class Structure:
    """The modules of a federation, and where the choice came from.

    Example:
        >>> gain = ModuleSpec("lnfit", "encoder.norm")
        >>> update = ModuleSpec("lora", "encoder.query", rank=2, scale=8.0)
        >>> structure = Structure((gain, update))
        >>> Structure.from_json(structure.to_json()) == structure
        True
    """

    modules: tuple[ModuleSpec, ...] = ()
    fingerprint: str = ""  # of the backbone it was found on; "" fits any with these targets
    gates: tuple[float, ...] = ()  # of a search, one a module: how sure it was
    provenance: Mapping[str, Any] = field(default_factory=dict)  # of a search: data, budget, seed
    mask: MaskCounts | None = None  # how dense each tensor's mask is; None: `mask.density` says so

    def __post_init__(self) -> None:
        seen: set[tuple[str, str]] = set()
        for spec in self.modules:
            if (spec.kind, spec.target) in seen:
                raise StructureError(
                    f"a structure may hold one {spec.kind!r} module a target, got two on "
                    f"{spec.target!r}. Remove one, or give the other a higher rank."
                )
            seen.add((spec.kind, spec.target))
        if self.gates and len(self.gates) != len(self.modules):
            raise StructureError(
                f"a structure's gates must be one a module, got {len(self.gates)} gates for "
                f"{len(self.modules)} modules."
            )

    def to_broadcast(self) -> Structure:
        """Return what nodes need of it: modules and mask. Gates and origin stay with the server."""
        mask = None if self.mask is None else replace(self.mask, sha256="")  # the plan has it
        return Structure(self.modules, mask=mask)

    def to_json(self) -> str:
        table: dict[str, Any] = {"schema": SCHEMA, "modules": [asdict(m) for m in self.modules]}
        for name in ("fingerprint", "gates", "provenance"):
            if getattr(self, name):
                table[name] = getattr(self, name)
        if self.mask is not None:
            table["mask"] = asdict(self.mask)
        return json.dumps(table, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Structure:
        """Read what `to_json` wrote.

        Raises:
            StructureError: No JSON, a newer schema, an unknown key, or a value that does not fit.
        """
        try:
            table = json.loads(text)
        except ValueError as error:
            raise StructureError(f"a structure must be a JSON file, but: {error}.") from None
        if not isinstance(table, dict) or not isinstance(table.get("schema"), int):
            raise StructureError('a structure\'s file must be a JSON object with "schema": 1.')
        if table["schema"] > SCHEMA:
            raise StructureError(
                f"this fedpet reads structures up to schema {SCHEMA}, the file has schema "
                f"{table['schema']}: it was written by a newer fedpet; update this one."
            )
        _known(table, ["schema", *(f.name for f in fields(cls))], "a structure")
        modules = table.get("modules")
        if not isinstance(modules, list) or not all(isinstance(m, dict) for m in modules):
            raise StructureError('a structure\'s "modules" must be a list of objects.')
        gates, provenance = table.get("gates", []), table.get("provenance", {})
        fingerprint = table.get("fingerprint", "")
        if not isinstance(gates, list) or not all(_is_number(gate) for gate in gates):
            raise StructureError('a structure\'s "gates" must be a list of numbers, all finite.')
        if not isinstance(provenance, dict) or not isinstance(fingerprint, str):
            raise StructureError(
                'a structure\'s "provenance" must be an object, its "fingerprint" a string.'
            )
        specs = tuple(_spec(module) for module in modules)
        gates = tuple(float(gate) for gate in gates)
        return cls(specs, fingerprint, gates, provenance, _mask(table.get("mask")))

    def check_backbone(self, fingerprint: str) -> None:
        """Refuse a backbone on which it was not found.

        Raises:
            StructureError: The fingerprints differ. A structure without one fits any backbone that
                has its targets.
        """
        if self.fingerprint and self.fingerprint != fingerprint:
            raise StructureError(
                f"a searched structure belongs to its backbone: this one was found on the "
                f"checkpoint {self.fingerprint:.12}, the backbone here is {fingerprint:.12}. Take "
                "that checkpoint, search again on this one, or name a preset: "
                "structure.preset = 'lnfit'."
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _known(table: Mapping[str, Any], names: Sequence[str], what: str) -> None:
    for name in table:
        if name not in names:
            raise StructureError(f"unknown key {name!r} in {what}. Known are: {', '.join(names)}.")


def _mask(table: Any) -> MaskCounts | None:
    if table is None:
        return None
    if not isinstance(table, dict) or not isinstance(table.get("entries"), dict):
        raise StructureError(
            'a structure\'s "mask" must be an object with "entries", counts by names of weights.'
        )
    _known(table, [f.name for f in fields(MaskCounts)], "a structure's mask")
    rule, seed, sha256 = table.get("rule", ""), table.get("seed", 0), table.get("sha256", "")
    if not (isinstance(rule, str) and isinstance(sha256, str) and isinstance(seed, int)):
        raise StructureError(
            'a structure\'s "mask" has a "rule" and a "sha256", strings, and a "seed", a whole '
            f"number, got {rule!r}, {sha256!r} and {seed!r}."
        )
    try:
        return MaskCounts(rule, seed, table["entries"], sha256)
    except ConfigError as error:
        raise StructureError(f"a structure's mask does not read: {error}") from None


def _spec(table: Mapping[str, Any]) -> ModuleSpec:
    _known(table, [f.name for f in fields(ModuleSpec)], "a structure's module")
    kind, target = table.get("kind"), table.get("target")
    rank, scale = table.get("rank", 0), table.get("scale", 1.0)
    if not isinstance(kind, str) or not isinstance(target, str):
        raise StructureError(f"a structure's module needs a kind and a target, got {dict(table)}.")
    if not _is_number(scale) or not isinstance(rank, int) or isinstance(rank, bool):
        raise StructureError(
            f"a module's rank must be a whole number and its scale a finite one, got {rank!r} and "
            f"{scale!r} on {target!r}."
        )
    return ModuleSpec(kind, target, rank, float(scale))


def load_structure(config: StructureConfig, positions: Sequence[Position]) -> Structure:
    """Read the structure that an experiment names: its file, else a preset.

    Args:
        config: A file, else a preset or a built-in structure.
        positions: Of the backbone, from `find_target_modules`.

    Raises:
        StructureError: The file does not read, or the preset does not fit.
    """
    file = config.file or structure_file(config.preset)
    if not file:
        return preset(config.preset, positions, rank=config.rank, scale=config.scale)
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise StructureError(
            f"the structure's file {str(file)!r} does not read: {error}."
        ) from None
    return Structure.from_json(text)


def structure_file(name: str) -> Path | None:
    """Return the file of a built-in structure, which lies beside the experiment of its name.

    Args:
        name: As in `structure.preset`; None is returned of one that names no built-in structure.
    """
    if name in PRESETS or Path(name).name != name:
        return None
    file = experiments_folder() / f"{name}.structure.json"
    return file if file.is_file() else None


def preset(names: str, positions: Sequence[Position], *, rank: int, scale: float) -> Structure:
    """Build a structure from names joined by "+".

    Args:
        names: "none", or names of `PRESETS`: "lnfit+bitfit".
        positions: Of the backbone, from `find_target_modules`.
        rank: Of the modules that have one.
        scale: Of LoRA; HiWi and the adapter have scale 1.

    Raises:
        StructureError: An unknown name, or one that finds nothing to act on in this backbone.
    """
    specs: list[ModuleSpec] = []
    for name in [] if names.strip() in ("", "none") else names.split("+"):
        name = name.strip()
        if name not in PRESETS:
            raise StructureError(
                f"structure.preset must be 'none' or of {', '.join(sorted(PRESETS))}, joined by "
                f"'+', or a built-in structure's name, got {name!r}."
            )
        kind, wanted = PRESETS[name]
        chosen = [p.name for p in positions if wanted(p)]
        if not chosen:
            raise StructureError(
                f"the preset {name!r} finds nothing to act on in this backbone. Leave it out, or "
                "take another."
            )
        specs += [spec_of(kind, target, rank=rank, scale=scale) for target in chosen]
    return Structure(tuple(dict.fromkeys(specs)))
