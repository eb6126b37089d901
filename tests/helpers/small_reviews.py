"""A few of the bundled reviews, so that an example of a page takes seconds."""

from __future__ import annotations

from collections import Counter

from datasets import DatasetDict

import fedpet


def small_reviews(*, films: int = 12, rows: int = 8, test_rows: int = 40) -> DatasetDict:
    """Return `rows` reviews of each of some films, and a few to evaluate on."""
    reviews = fedpet.bundled_reviews()
    owners = reviews["train"]["film"]
    counts = Counter(owners)
    left = dict.fromkeys(sorted(film for film in counts if counts[film] >= rows)[:films], rows)
    chosen = []
    for index, film in enumerate(owners):
        if left.get(film):
            left[film] -= 1
            chosen.append(index)
    test = reviews["test"]
    return DatasetDict(train=reviews["train"].select(chosen), test=test.select(range(test_rows)))
