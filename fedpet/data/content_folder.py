"""Keep a folder of files in the cache, under the SHA-256 of what it holds.

In:  a function that fills a folder.
Out: the folder's place, the same for the same content; a second process finds it there.
"""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from fedpet.errors import DataError

__all__ = ["hash_folder", "store_folder"]


def store_folder(root: Path, fill: Callable[[Path], None], *, key: str = "") -> Path:
    """Fill a folder below `root`, unless it is there.

    Args:
        root: Made, where it is absent.
        fill: Writes the files into the empty folder that it is given.
        key: Names the content (hex), where that is known without writing it; "" takes the hash of
            the files.

    Raises:
        DataError: The folder cannot be written.
    """
    if key and (root / key[:32]).is_dir():
        return root / key[:32]
    building = root / f".building-{uuid.uuid4().hex}"
    try:
        building.mkdir(parents=True)
        fill(building)
        folder = root / (key or hash_folder(building))[:32]
        if not folder.is_dir():
            try:
                building.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster
                    raise
        return folder
    except OSError as error:
        raise DataError(
            f"the cache {str(root)!r} cannot be written: {error.strerror or error}. Name a folder "
            "that can be, with room for the rows and the model, by run.cache or $FEDPET_CACHE."
        ) from None
    finally:
        shutil.rmtree(building, ignore_errors=True)


def hash_folder(folder: Path) -> str:
    """Return the SHA-256 (hex) over the names and contents of a folder's files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").digest()
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + content)
    return digest.hexdigest()
