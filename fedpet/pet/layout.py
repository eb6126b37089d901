"""Order the values in the one vector that is communicated.

In:  the PET modules of an adapted model, in their order.
Out: the segments of the vector, for each tier of devices; where each module's values lie; the runs
     that a codec scales and rotates apart, and a hash that two sides compare.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from fedpet.pet.modules.base import PetModule

__all__ = [
    "Communicated",
    "Segment",
    "head_groups",
    "layout_hash",
    "quantisation_groups",
    "segments_of",
    "split_trainables",
]


@dataclass(frozen=True)
class Segment:
    """One stretch of the communicated values."""

    kind: str  # "mask", "head", or the kind of a structure's module
    name: str  # of the parameter (mask, head) or of the module's target
    start: int
    size: int


class Communicated(Protocol):
    """A model that states its communicated values, for each tier of devices."""

    @property
    def tiers(self) -> tuple[tuple[Segment, ...], ...]:
        """Give the layout of each tier, weakest first; of all last."""


def segments_of(
    modules: Sequence[PetModule], tier: Mapping[str, int] | None
) -> tuple[Segment, ...]:
    """Return the layout where the mask is cut to a tier's number of entries of each weight."""
    segments, start = [], 0
    for module in modules:
        for name, size in module.parts:
            if tier is not None and module.place == "mask":
                size = tier[name]
            if size:
                segments.append(Segment(module.kind, name, start, size))
                start += size
    return tuple(segments)


def split_trainables(
    modules: Sequence[PetModule],
) -> tuple[list[tuple[slice, slice]], list[tuple[PetModule, slice]]]:
    """Find where the values of each module lie.

    Returns:
        Pairs of slices (values, flat storage) that are plain copies; and the modules whose values
        must be computed, such as HiWi on a bias, with their slice of the values.
    """
    as_they_lie: list[tuple[slice, slice]] = []
    own_way: list[tuple[PetModule, slice]] = []
    stop = 0
    for module in modules:
        start, stop = stop, stop + module.num_values
        if stop == start:
            continue
        if module.place == "mask" or not module.sends_trainables:
            own_way.append((module, slice(start, stop)))
            continue
        first = module.trainables[0].storage_offset()
        place, stretch = slice(start, stop), slice(first, first + stop - start)
        if as_they_lie:
            before, there = as_they_lie[-1]
            if (before.stop, there.stop) == (start, first):
                as_they_lie.pop()
                place, stretch = slice(before.start, stop), slice(there.start, stretch.stop)
        as_they_lie.append((place, stretch))
    return as_they_lie, own_way


def head_groups(segments: Sequence[Segment]) -> list[tuple[int, int]]:
    """Return the entries of `quantisation_groups` that are the head's."""
    heads = {segment.start for segment in segments if segment.kind == "head"}
    return [group for group in quantisation_groups(segments) if group[0] in heads]


def quantisation_groups(segments: Sequence[Segment]) -> list[tuple[int, int]]:
    """Join segments of one kind to runs (start, stop), which a codec scales and rotates apart.

    Example:
        >>> quantisation_groups([Segment("mask", "a", 0, 5), Segment("mask", "b", 5, 2),
        ...                      Segment("head", "c", 7, 3)])
        [(0, 7), (7, 10)]
    """
    groups: list[tuple[int, int]] = []
    kind = None
    for segment in segments:
        stop = segment.start + segment.size
        if segment.kind == kind:
            groups[-1] = (groups[-1][0], stop)
        else:
            groups.append((segment.start, stop))
        kind = segment.kind
    return groups


def layout_hash(tiers: Sequence[Sequence[Segment]]) -> str:
    """Hash the order, kinds, names and sizes of the values of each tier: SHA-256, hex."""
    lines = [f"{s.kind} {s.name} {s.start} {s.size}" for segments in tiers for s in segments]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
