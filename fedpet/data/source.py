"""Define a source of rows: the identity of a split, cheaply, and the split itself as a `Table`."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedpet.data.split_table import Table
from fedpet.errors import DataError

__all__ = ["Source", "check_split", "first_line", "hash_file"]


class Source(ABC):
    """A data set: its splits by name."""

    description: str  # "the folder 'reviews'", for messages

    @abstractmethod
    def check(self, split: str) -> None:
        """Refuse a split that is known not to be there, by a `DataError`."""

    @abstractmethod
    def identity(self, split: str) -> dict[str, Any]:
        """Return what tells this split's rows from any others', as JSON values."""

    @abstractmethod
    def read(self, split: str) -> Table:
        """Read all rows of a split, once."""

    def folder(self, split: str) -> Path | None:
        """Return where paths in the rows begin; None where that is the current folder."""
        return None


def check_split(split: str, known: Sequence[str], what: str) -> None:
    """Refuse a split that a source has not."""
    if split not in known:
        raise DataError(
            f"{what} has no split {split!r}. It has {_listed(known)}: set data.train-split and "
            "data.eval-split ('' holds evaluation rows out of the training split)."
        )


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names) or "none"
