"""The order of the values in the one vector that is communicated.

In:  the segments of an adapted model (fedpet/model.py).
Out: the runs that a codec scales and rotates apart, and a hash that two sides compare.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from fedpet.model import Segment

__all__ = ["groups_by_kind", "head_groups", "layout_hash"]


def head_groups(segments: Sequence[Segment]) -> list[tuple[int, int]]:
    """Those of `groups_by_kind` that are the head's."""
    heads = {segment.start for segment in segments if segment.kind == "head"}
    return [group for group in groups_by_kind(segments) if group[0] in heads]


def groups_by_kind(segments: Sequence[Segment]) -> list[tuple[int, int]]:
    """Runs of segments of one kind, as (start, stop): what a codec scales and rotates apart."""
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
    """SHA-256 (hex) over the order, kinds, names and sizes of the values of each tier."""
    lines = [f"{s.kind} {s.name} {s.start} {s.size}" for segments in tiers for s in segments]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
