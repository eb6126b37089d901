"""Load what turns images or speech into a model's inputs: transformers' own processors.

In:  a checkpoint's folder, with preprocessor_config.json.
Out: an image processor, computed by Pillow wherever it runs, so that all machines have the same
     bytes; or a feature extractor; and a hash of their settings.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

from fedpet.data.padding import NO_CODE
from fedpet.data.saved_tokenizer import save_tokenizer
from fedpet.data.tokenize import PROCESSOR_FILES
from fedpet.errors import ConfigError, DataError

__all__ = [
    "has_processor",
    "hash_processor",
    "load_feature_extractor",
    "load_image_processor",
    "save_reader",
]


def has_processor(folder: Path) -> bool:
    """Tell whether a checkpoint reads anything but texts."""
    return any((folder / name).is_file() for name in PROCESSOR_FILES)


def hash_processor(folder: Path) -> str:
    """Return the SHA-256, 64 hex digits, of a processor's settings.

    Raises:
        DataError: The folder holds none.
    """
    if not has_processor(folder):
        raise DataError(
            f"{str(folder)!r} holds no preprocessor_config.json, which says what size and scale of "
            "images or speech the model takes: take a checkpoint that comes with it."
        )
    digest = hashlib.sha256()
    for name in PROCESSOR_FILES:
        if (folder / name).is_file():
            digest.update(name.encode() + hashlib.sha256((folder / name).read_bytes()).digest())
    return digest.hexdigest()


def load_image_processor(folder: Path) -> Any:
    """Load a checkpoint's image processor.

    Raises:
        ConfigError: Pillow is not installed.
        DataError: There is none, or transformers cannot load it.
    """
    hash_processor(folder)
    try:
        import PIL.Image  # noqa: F401  transformers would name a processor that is not there
    except ImportError:
        raise ConfigError(
            "images need Pillow, which is not installed: `pip install 'fedpet[images]'`."
        ) from None
    from transformers import AutoImageProcessor

    return _loaded(lambda: AutoImageProcessor.from_pretrained(folder, backend="pil", **NO_CODE))


def load_feature_extractor(folder: Path) -> Any:
    """Load a checkpoint's feature extractor.

    Raises:
        DataError: There is none, or transformers cannot load it.
    """
    hash_processor(folder)
    from transformers import AutoFeatureExtractor

    return _loaded(lambda: AutoFeatureExtractor.from_pretrained(folder, **NO_CODE))


def _loaded(load: Any) -> Any:
    try:
        return load()
    except Exception as error:  # transformers raises many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"the checkpoint's processor cannot be loaded: {reason[:200]}") from None


def save_reader(checkpoint: Path, folder: Path) -> None:
    """Put what reads a checkpoint's rows beside a plain model: processor, tokeniser, or both.

    Raises:
        DataError: The checkpoint's tokeniser cannot be loaded.
        RunError: The saved tokeniser reads texts in another way.
        OSError: The folder cannot be written.
    """
    from fedpet.data.tokenize import has_tokenizer

    for name in PROCESSOR_FILES:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, folder / name)
    if has_tokenizer(checkpoint) or not has_processor(checkpoint):
        save_tokenizer(checkpoint, folder)
