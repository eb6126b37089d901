"""Count the values that a run communicates, by kind, from a backbone's outline.

The structure's modules are the run's own, built on the meta device. The mask's entries are not
known without weights, but their number is.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby, pairwise

from fedpet.backbone.module_roles import Position, find_target_modules, maskable_weights
from fedpet.backbone.pretrained import Backbone
from fedpet.config import Experiment, MaskConfig
from fedpet.errors import ConfigError
from fedpet.pet.layout import Segment
from fedpet.pet.mask import mask_size
from fedpet.pet.modules.building import build_structure
from fedpet.pet.structure import Structure, load_structure

__all__ = ["LORA_RANK", "Layout", "count_values"]

LORA_RANK = 8
# Where peft puts LoRA by default: query and value, or the one product that makes both.
_LORA_ROLES = ("query", "value", "query-key-value", "cross-query", "cross-value")


@dataclass(frozen=True)
class Layout:
    """Hold the counts of one experiment on one architecture.

    Attributes:
        segments: The communicated values, one segment a kind and stretch: as in a run, but for
            the mask's, which are one.
        tier_masks: Entries of the mask that each tier trains, weakest first; the last trains all.
            (0,) without a mask.
        structure: Modules and their targets.
        scope: Entries of each weight the mask chooses from, in the order of the names.
        pretrained_parameters: Of the backbone, its head not counted.
        head_parameters: Of the head, all communicated.
        lora_values: Both factors of LoRA with rank 8 on query and value, the head not counted.
    """

    segments: tuple[Segment, ...]
    tier_masks: tuple[int, ...]
    structure: Structure
    scope: tuple[int, ...]
    pretrained_parameters: int
    head_parameters: int
    lora_values: int

    @property
    def num_values(self) -> int:
        """Count the communicated values."""
        return sum(segment.size for segment in self.segments)

    @property
    def values_by_kind(self) -> dict[str, int]:
        """Count the communicated values by kind, in the order of the layout."""
        counts: dict[str, int] = {}
        for segment in self.segments:
            counts[segment.kind] = counts.get(segment.kind, 0) + segment.size
        return counts

    def kinds(self, tier: int = -1) -> list[tuple[str, int]]:
        """Return kind and size of each group that a codec scales apart, in a tier."""
        sizes = [
            (segment.kind, self.tier_masks[tier] if segment.kind == "mask" else segment.size)
            for segment in self.segments
        ]
        groups = groupby(sizes, key=lambda kind_and_size: kind_and_size[0])
        return [(kind, sum(size for _, size in group)) for kind, group in groups]


def count_values(backbone: Backbone, experiment: Experiment) -> Layout:
    """Count the values that a run of this experiment would communicate.

    Args:
        backbone: From `outline`, or a loaded one. Left as it is.
        experiment: Its mask, structure and seed count.

    Raises:
        ConfigError: The mask's density leaves nothing to train, or nothing is trained at all.
        StructureError: The structure does not fit this backbone.
    """
    model = backbone.model
    positions = find_target_modules(model, backbone.head)
    structure = load_structure(experiment.structure, positions)
    weights = maskable_weights(model, backbone.head)
    scope = tuple(weights[name].numel() for name in sorted(weights))
    parts: list[tuple[str, str, int]] = []
    tier_masks: tuple[int, ...] = (0,)
    if experiment.mask.enabled:
        tier_masks = _tier_masks(scope, experiment.mask)
        parts.append(("mask", "", tier_masks[-1]))
    for module in build_structure(model, positions, structure, experiment.run.seed):
        parts.append((module.kind, module.target, module.num_values))
    for name in backbone.trained_head:
        parts.append(("head", name, model.get_parameter(name).numel()))
    segments, start = [], 0
    for kind, name, size in parts:
        if size:
            segments.append(Segment(kind, name, start, size))
            start += size
    if not segments:
        raise ConfigError(
            "nothing is trained: the backbone has no head, mask.enabled is false and the "
            "structure is empty. Enable one of them."
        )
    return Layout(
        segments=tuple(segments),
        tier_masks=tier_masks,
        structure=structure,
        scope=scope,
        pretrained_parameters=backbone.pretrained_parameters,
        head_parameters=sum(size for kind, _, size in parts if kind == "head"),
        lora_values=sum(_lora_values(position) for position in positions),
    )


def _tier_masks(scope: tuple[int, ...], config: MaskConfig) -> tuple[int, ...]:
    """Count the entries that `fedpet.pet.mask.build_mask` chooses for each tier."""
    tiers = tuple(_num_masked(scope, config, density) for density in config.tier_densities)
    if not tiers[-1]:
        raise ConfigError(
            f"mask.density {config.density!r} leaves nothing to train: it is a fraction of the "
            f"{sum(scope):,} entries in scope, rounded down."
        )
    if any(more <= less for less, more in pairwise((0, *tiers))):
        raise ConfigError(
            f"each of mask.tiers must train more entries than the one below it, got {list(tiers)} "
            f"for {list(config.tiers)}: a density is rounded down to whole entries."
        )
    return tiers


def _num_masked(scope: tuple[int, ...], config: MaskConfig, density: float) -> int:
    if config.granularity == "per-tensor":
        return sum(mask_size(density, size) for size in scope)
    return mask_size(density, sum(scope))


def _lora_values(position: Position) -> int:
    if position.kind not in ("linear", "conv1d") or position.role not in _LORA_ROLES:
        return 0
    return LORA_RANK * (position.in_features + position.out_features)
