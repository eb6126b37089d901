"""Convert a checkpoint of another program into safetensors: once a machine, in the cache.

In:  a file, and what makes a checkpoint's folder of it.
Out: that folder. The first caller makes it, under a lock, and others wait.

The cache is $FEDPET_CACHE or ~/.cache/fedpet; run.cache is not asked, since a checkpoint serves all
experiments.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpet.errors import BackboneError
from fedpet.utils.atomic_write import whole_folder
from fedpet.utils.lock import locked
from fedpet.utils.paths import cache_root

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["check_tensors", "converted_once", "hash_of", "save_tensors"]

log = logging.getLogger(__name__)


def converted_once(
    name: str, *, dtype: str, sha256: str, version: int, convert: Callable[[Path], None]
) -> Path:
    """Return the folder of a file's checkpoint.

    Args:
        name: Of the model, with which the folder's begins.
        dtype: Of the weights, "float32" or "bfloat16".
        sha256: Of the file that is converted, in hex.
        version: Of the way of converting: with another the same file gives another folder.
        convert: Fills a folder; called where there is none yet.

    Raises:
        BackboneError: The cache cannot be written; or as `convert`.
    """
    root = cache_root() / "backbones"
    key = hashlib.sha256(f"{version} {sha256} {dtype}".encode()).hexdigest()[:16]
    folder = root / f"{name}-{dtype}-{key}"
    if folder.is_dir():
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked(root / f".{folder.name}.lock", folder, wait=True):
            if not folder.is_dir():
                log.warning("converting %s to safetensors in %s, once", name, folder)
                with whole_folder(folder) as building:
                    convert(building)
    except OSError as error:
        raise BackboneError(
            f"the cache {str(root)!r} cannot be written: {error.strerror or error}. Name a folder "
            "that can be, with room for the model, by $FEDPET_CACHE."
        ) from None
    return folder


def hash_of(file: Path) -> str:
    """Return the SHA-256 of a file, in hex.

    Raises:
        BackboneError: It does not read.
    """
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise BackboneError(f"{str(file)!r} does not read: {error.strerror or error}.") from None


def check_tensors(tensors: Mapping[str, Tensor], model: nn.Module, what: str) -> dict[str, Tensor]:
    """Return the tensors that a model has a place for.

    Raises:
        BackboneError: One is absent, of another shape, or has NaN or infinity.
    """
    import torch

    wanted = dict(model.named_parameters())  # tied ones once
    absent = [name for name in wanted if name not in tensors]
    if absent:
        raise BackboneError(
            f"{what} lacks {len(absent)} of the {len(wanted)} tensors of a "
            f"{type(model).__name__}, {absent[0]!r} for one: take a file of the whole model."
        )
    for name, parameter in wanted.items():
        if tensors[name].shape != parameter.shape:
            raise BackboneError(
                f"{what} has {name!r} in the shape {tuple(tensors[name].shape)}, and by its own "
                f"settings it is {tuple(parameter.shape)}: download it anew."
            )
        if not torch.isfinite(tensors[name]).all():
            raise BackboneError(f"{what} has NaN or infinity in {name!r}: download it anew.")
    return {name: tensors[name] for name in wanted}


def save_tensors(
    tensors: Mapping[str, Tensor], kind: Any, config: Any, folder: Path, *, dtype: str, what: str
) -> None:
    """Save tensors as a checkpoint, under the names that transformers writes.

    Args:
        tensors: By the names that the model has in memory.
        kind: The model's class.
        config: Its configuration.
        folder: To fill.
        dtype: Of the weights.
        what: The file, for messages.

    Raises:
        BackboneError: As `check_tensors`.
    """
    import torch
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    with torch.device("meta"):
        model = kind(config)
    found = check_tensors(tensors, model, what)
    model.load_state_dict(
        {name: tensor.to(getattr(torch, dtype)).contiguous() for name, tensor in found.items()},
        strict=False,  # tied tensors stand there once
        assign=True,
    )
    model.tie_weights()
    model.config.dtype = dtype
    model.save_pretrained(folder)
