"""Count the values that a run communicates, by kind, from a backbone's outline.

The structure's modules are the run's own, built on the meta device. The mask's entries are not
known without weights, but their number is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

from fedpet.backbone.module_roles import Position, find_target_modules, maskable_weights
from fedpet.backbone.pretrained import Backbone
from fedpet.config import Experiment, MaskConfig
from fedpet.errors import ConfigError
from fedpet.pet.mask import check_tiers, mask_size
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
        tiers: Kind and size of each group of values that a codec scales apart, of each tier,
            weakest first; the last trains all.
        structure: Modules and their targets.
        scope: Entries of each weight the mask chooses from, in the order of the names.
        pretrained_parameters: Of the backbone, its head not counted.
        head_parameters: Of the head, all communicated.
        lora_values: Both factors of LoRA with rank 8 on query and value, the head not counted.
    """

    tiers: tuple[tuple[tuple[str, int], ...], ...]
    structure: Structure
    scope: tuple[int, ...]
    pretrained_parameters: int
    head_parameters: int
    lora_values: int

    @property
    def num_values(self) -> int:
        """Count the communicated values."""
        return sum(size for _, size in self.tiers[-1])

    @property
    def values_by_kind(self) -> dict[str, int]:
        """Count the communicated values by kind, in the order of the layout."""
        counts: Counter[str] = Counter()
        for kind, size in self.tiers[-1]:
            counts[kind] += size
        return dict(counts)


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
    if structure.mask is not None:
        structure.mask.check(experiment.mask)
        masks: tuple[int, ...] = (structure.mask.num_values,)
    else:
        masks = _masks(scope, experiment.mask) if experiment.mask.enabled else (0,)
    modules = build_structure(model, positions, structure, experiment.run.seed)
    head = sum(model.get_parameter(name).numel() for name in backbone.trained_head)
    others = [*((module.kind, module.num_values) for module in modules), ("head", head)]
    if not masks[-1] + sum(size for _, size in others):
        raise ConfigError(
            "nothing is trained: the backbone has no head, mask.enabled is false and the "
            "structure is empty. Enable one of them."
        )
    return Layout(
        tiers=tuple(_groups([("mask", count), *others]) for count in masks),
        structure=structure,
        scope=scope,
        pretrained_parameters=backbone.pretrained_parameters,
        head_parameters=head,
        lora_values=sum(_lora_values(position) for position in positions),
    )


def _groups(sizes: Iterable[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
    """Join neighbours of one kind, and leave out what is empty."""
    groups = groupby(((kind, size) for kind, size in sizes if size), key=itemgetter(0))
    return tuple((kind, sum(size for _, size in group)) for kind, group in groups)


def _masks(scope: Sequence[int], config: MaskConfig) -> tuple[int, ...]:
    """Count the entries that `fedpet.pet.mask.build_mask` chooses for each tier."""
    sizes = scope if config.granularity == "per-tensor" else (sum(scope),)
    masks = tuple(sum(mask_size(d, n) for n in sizes) for d in config.tier_densities)
    if not masks[-1]:
        raise ConfigError(
            f"mask.density {config.density!r} leaves nothing to train: it is a fraction of the "
            f"{sum(scope):,} entries in scope, rounded down."
        )
    check_tiers(masks, config)
    return masks


def _lora_values(position: Position) -> int:
    if position.kind not in ("linear", "conv1d") or position.role not in _LORA_ROLES:
        return 0
    return LORA_RANK * (position.in_features + position.out_features)
