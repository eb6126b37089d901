"""Find the entities that a sequence of tags spells, to count those that two sequences share.

A tag is "O", or a prefix and a kind joined by "-": "B-PER". An entity begins at B, S or U, where
its kind is another than the tag's before, or after a tag that ends one; it ends before the next
that begins, before "O", and after E, L or S. So IOB1, IOB2, IOBES and BILOU are all read, and a
sequence that breaks its scheme as the CoNLL script reads it.

Written here since the usual library, seqeval, had its last release in October 2020, is no wheel,
and asks for scikit-learn; these rules are its default ones, the CoNLL-2000 script's.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["spans_of"]

Span = tuple[str, int, int]  # kind, first word, last word


def spans_of(tags: Sequence[str]) -> set[Span]:
    """Return the entities of a row.

    Example:
        >>> sorted(spans_of(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"]))
        [('LOC', 3, 3), ('LOC', 4, 4), ('PER', 0, 1)]
    """
    spans: set[Span] = set()
    start, before, kind = 0, "O", ""
    for index, tag in enumerate([*tags, "O"]):
        prefix, _, other = tag.partition("-") if "-" in tag else (tag[:1], "", tag[2:] or "_")
        inside = before != "O"
        same = inside and other == kind
        begins = prefix in ("B", "S", "U") or before in ("E", "L", "S", "U") or not same
        if inside and (prefix == "O" or begins):
            spans.add((kind, start, index - 1))
        if prefix != "O" and (not inside or begins):
            start = index
        before, kind = prefix, other
    return spans
