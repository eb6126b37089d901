"""Write a plain model as a Hugging Face folder, its tokeniser and class names beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from fedpet.backbone.classifier import class_names, generates
from fedpet.data.processors import save_reader
from fedpet.errors import RunError
from fedpet.utils.atomic_write import whole_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["no_room", "write_model"]


def write_model(model: PreTrainedModel, tokenizer: Path, folder: Path) -> None:
    """Save a plain model as a Hugging Face folder, whole or not at all.

    Args:
        model: Its config names the classes.
        tokenizer: The checkpoint's folder, whose tokeniser or processor goes beside it.
        folder: To make; one of a run that was cut short is replaced.

    Raises:
        RunError: The disk does not take it.
    """
    from safetensors import SafetensorError

    try:
        with whole_folder(folder) as building:
            model.save_pretrained(building)
            _write_class_names(building / "config.json", model)
            save_reader(tokenizer, building)
    except (OSError, SafetensorError) as error:  # the latter of its own files, and no OSError
        raise no_room(folder, error) from None


def no_room(path: Path, error: Exception) -> RunError:
    """Say that a run's file cannot be written."""
    reason = getattr(error, "strerror", None) or error
    return RunError(
        f"{str(path)!r} cannot be written: {reason}. Make room and do it again; a run that "
        "was cut short goes on with `fedpet simulate --resume RUN`."
    )


def _write_class_names(file: Path, model: PreTrainedModel) -> None:
    """Put the classes into config.json where transformers leaves them out.

    It leaves out names that it makes itself, and some architectures then take another number.
    """
    if generates(model):
        return
    config, names = json.loads(file.read_text(encoding="utf-8")), class_names(model.config)
    if "id2label" not in config:
        config["id2label"] = dict(enumerate(names))
        config["label2id"] = {name: index for index, name in enumerate(names)}
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
