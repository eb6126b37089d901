"""Read the rows of local files, one or more a split."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedpet.data.formats import read_file, suffix_of
from fedpet.data.source import Source, check_split, first_line, hash_file
from fedpet.data.split_table import Table
from fedpet.errors import DataError, FedpetError

__all__ = ["Files"]


@dataclass
class Files(Source):
    """Local files: one or more to a split, or one file that is the only split, named ""."""

    description: str
    files: dict[str, list[Path]]  # by split
    _tables: dict[str, Table] = field(default_factory=dict)
    _identities: dict[str, dict[str, Any]] = field(default_factory=dict)

    def check(self, split: str) -> None:
        self._of(split)

    def identity(self, split: str) -> dict[str, Any]:
        if split not in self._identities:
            files = [(suffix_of(path), hash_file(path)) for path in self._of(split)]
            self._identities[split] = {"files": files}
        return self._identities[split]

    def read(self, split: str) -> Table:
        if split not in self._tables:
            self._tables[split] = self._read(split)
        return self._tables[split]

    def folder(self, split: str) -> Path | None:
        return self._of(split)[0].parent

    def _of(self, split: str) -> list[Path]:
        if "" in self.files:
            return self.files[""]
        check_split(split, sorted(self.files), self.description)
        return self.files[split]

    def _read(self, split: str) -> Table:
        pieces = []
        for path in self._of(split):
            try:
                pieces.append(read_file(path))
            except FedpetError:
                raise
            except Exception as error:  # pyarrow and the decompressors each have their own
                raise DataError(
                    f"{self.description}, file {path.name!r}, cannot be read: "
                    f"{first_line(error).rstrip('.')}."
                ) from None
        if len(pieces) > 1 and any(piece.num_rows for piece in pieces):
            pieces = [piece for piece in pieces if piece.num_rows]  # Spark leaves empty ones
        return Table(pieces)
