"""Choose rows by a hash of their texts: equal texts fall on one side, on every machine.

In:  columns of texts; the fraction to hold out, and how many rows to take at most.
Out: row numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from fedpet.data.column import BATCH_ROWS, Column

__all__ = ["choose_rows", "hash_rows", "hold_out", "hold_out_own"]

_SEPARATOR = b"\x1f"
HASH_BYTES = 6


def hash_rows(texts: Sequence[Sequence[str]], part: int = 0) -> np.ndarray:
    """Return a number in [0, 1) for each row, that depends on its texts alone: float64 (n,).

    Args:
        texts: A column, or two.
        part: Of the hash; numbers of different parts say nothing of one another.
    """
    rows = zip(*map(_encoded, texts), strict=True)
    place = slice(HASH_BYTES * part, HASH_BYTES * (part + 1))
    parts = (hashlib.sha256(_SEPARATOR.join(row)).digest()[place] for row in rows)
    numbers = (int.from_bytes(part, "big") / 2**48 for part in parts)
    return np.fromiter(numbers, dtype=np.float64, count=len(texts[0]))


def choose_rows(
    num_rows: int, hashes: np.ndarray | None, part: str, eval_fraction: float, max_rows: int
) -> np.ndarray:
    """Return the row numbers of a part, int64 (k,), ascending.

    Args:
        num_rows: Of the whole.
        hashes: Of `hash_rows`; None takes all rows.
        part: "all", "kept" or "held out".
        eval_fraction: Of the rows, to be held out.
        max_rows: Those with the smallest hashes are taken; 0 takes all.
    """
    numbers = np.arange(num_rows)
    if hashes is None:
        return numbers
    if part != "all":
        numbers = np.flatnonzero((hashes < eval_fraction) == (part == "held out"))
    if 0 < max_rows < len(numbers):
        smallest = np.argsort(hashes[numbers], kind="stable")[:max_rows]
        numbers = np.sort(numbers[smallest])
    return numbers


def hold_out(texts: Sequence[Sequence[str]], eval_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of the rows to train on and of those to evaluate on, by their texts.

    Args:
        texts: A column, or two.
        eval_fraction: Of the rows, to be held out.
    """
    hashes = hash_rows(texts)
    kept, held = (
        choose_rows(len(hashes), hashes, part, eval_fraction, 0) for part in ("kept", "held out")
    )
    return kept, held


def hold_out_own(
    parts: Mapping[str, np.ndarray], hashes: np.ndarray, fraction: float, min_rows: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Hold out some of each client's rows.

    Args:
        parts: Row numbers by client.
        hashes: Of all rows, of another part of the hash than decides the server's rows.
        fraction: Of the rows, to be held out.
        min_rows: That must be left to train on; of a client that would have fewer none is held out.

    Returns:
        By client the rows to train on, and those held out.
    """
    trained, held = {}, {}
    for name, rows in parts.items():
        out = hashes[rows] < fraction
        if len(rows) - np.count_nonzero(out) < min_rows:
            out[:] = False
        trained[name], held[name] = rows[~out], rows[out]
    return trained, held


def _encoded(column: Sequence[str]) -> Iterator[bytes]:
    if isinstance(column, Column) and column.is_text:
        kind = "large_binary" if str(column.arrow.type) == "large_string" else "binary"
        for start in range(0, len(column), BATCH_ROWS):
            yield from column.arrow.slice(start, BATCH_ROWS).cast(kind).to_pylist()
    else:
        for text in column:
            if not isinstance(text, str):  # the turns of a conversation
                text = json.dumps(text, sort_keys=True, ensure_ascii=False, default=str)
            yield text.encode("utf-8", "surrogatepass")
