"""Keep the state of a search on disk, so that a killed one goes on, bit for bit."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedpet.config import SearchConfig
from fedpet.data.rows import Rows
from fedpet.errors import ConfigError
from fedpet.search.bilevel import BiLevel
from fedpet.search.settings import reproducible_settings

if TYPE_CHECKING:
    from fedpet.backbone.pretrained import Backbone
    from fedpet.data import Task
    from fedpet.pet.mask import Mask

__all__ = ["SavedSearch", "repeat_file", "search_digest"]

SAVE_SECONDS = 15.0  # of work that a kill may cost


class SavedSearch:
    """A search's state on disk, under the digest of what it searches."""

    def __init__(self, path: Path | None, digest: str) -> None:
        self._path, self._digest = path, digest
        self._at = time.monotonic()  # of the last saving

    @property
    def is_due(self) -> bool:
        """Tell whether so much work is not saved yet that it should be."""
        return time.monotonic() - self._at > SAVE_SECONDS

    def load(self, search: BiLevel) -> tuple[dict[str, Any], list[dict[str, float]]]:
        """Go on from the file where there is one; give the best checkpoint and the history."""
        if self._path is None or not self._path.exists():
            return {}, []
        try:
            table = torch.load(self._path, weights_only=True)
            digest = table["digest"]
        except Exception as error:  # torch names no class for what a file may not be
            raise ConfigError(
                f"{str(self._path)!r} is not the state of a search "
                f"({type(error).__name__}): remove it, or name another file."
            ) from None
        if digest != self._digest:
            raise ConfigError(
                f"{str(self._path)!r} is the state of a search with other settings, rows or "
                "backbone: remove it, or name another file."
            )
        search.load_state(table["search"])
        return table["best"], table["history"]

    def save(self, search: BiLevel, best: dict[str, Any], history: list[dict[str, float]]) -> None:
        """Write the state, the best checkpoint and the history; nothing where there is no file."""
        if self._path is None:
            return
        table = {
            "digest": self._digest,
            "search": search.state(),
            "best": best,
            "history": history,
        }
        new = self._path.with_name(self._path.name + ".new")
        torch.save(table, new)
        os.replace(new, self._path)
        self._at = time.monotonic()


def repeat_file(state_file: Path | None, repeat: int) -> Path | None:
    """Return where the state of one repeat of a search lies; of the first the file itself.

    Example:
        >>> repeat_file(Path("state.pt"), 2).name
        'state.pt.2'
    """
    if state_file is None or not repeat:
        return state_file
    return state_file.with_name(f"{state_file.name}.{repeat}")


def search_digest(
    config: SearchConfig,
    losses: tuple[float, str],
    products: str,
    backbone: Backbone,
    rows: Rows,
    task: Task,
    mask: Mask | None,
) -> str:
    """Hash all that a search's steps depend on."""
    masked = None if mask is None else mask.digest()
    settings = (sorted(reproducible_settings(config).items()), losses, products)
    digest = hashlib.sha256(repr((settings, backbone.fingerprint, task, masked)).encode())
    for part in (rows.tokens, rows.offsets, rows.labels, rows.tags, rows.choices):
        if part is not None:
            digest.update(np.ascontiguousarray(part).tobytes())
    if rows.dense is not None:
        digest.update(np.ascontiguousarray(rows.dense.values).tobytes())
    return digest.hexdigest()
