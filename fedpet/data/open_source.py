"""Open the source of rows: a package, split files, one file, or the hub.

In:  `DataConfig.source`.
Out: a `Source`: the identity of a split, cheaply, and the split itself as a `Table`.

Finding a source and telling its identity reads no text and imports nothing heavy, so a start
from the cache costs a hash of the files. The rows of a local source stay here: its files are not
uploaded, counted or copied anywhere.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from fedpet.data.chats import CHATS_FILE, Chats
from fedpet.data.film_reviews import FILM_FILE, FilmReviews
from fedpet.data.formats import is_readable, readable
from fedpet.data.hub_dataset import HubDataset
from fedpet.data.local_files import Files
from fedpet.data.source import Source
from fedpet.data.splits import find_splits
from fedpet.errors import AbsentDataError, DataError
from fedpet.utils import bundled

__all__ = ["open_source"]


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


def _open_package(package: str) -> Source:
    if package == bundled.name_of(bundled.REVIEWS):
        return FilmReviews(_packaged(bundled.REVIEWS, FILM_FILE, "film reviews"))
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
