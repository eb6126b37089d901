"""Give each image one of several classes, by a model that reads pixels (ViT, DINOv2).

`data.text-columns` names the column of images, see fedpet/data/images.py. The checkpoint's own
image processor cuts each to the model's size once; what it makes, bytes, is stored, and scaled as a
batch is made. Loss and metrics are a classification's.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpet.errors import ConfigError, DataError
from fedpet.tasks.classification import Classification
from fedpet.tasks.task_kind import Encoding, RawRows, refuse_settings, register_task

if TYPE_CHECKING:
    from fedpet.config import DataConfig, Experiment
    from fedpet.data.padding import Padding
    from fedpet.data.split_rows import Split
    from fedpet.tasks.task import Task

__all__ = ["ImageClassification"]

_STEP = 64  # images processed at a time


@register_task("image-classification")
class ImageClassification(Classification):
    """Give each image one of several classes."""

    model_class = "AutoModelForImageClassification"
    pipeline = "image-classification"
    stacks = False
    reads_files = True

    def check_data(self, data: DataConfig) -> None:
        """Refuse more columns than one; see `TaskKind.check_data`."""
        if len(data.text_columns) != 1:
            raise ConfigError(
                f"data.text-columns must name the one column of images for data.task = "
                f"{data.task!r}, got {list(data.text_columns)}."
            )

    def check_experiment(self, experiment: Experiment) -> None:
        """Refuse what is of tokens; see `TaskKind.check_experiment`."""
        reason = "training.cls-only = true skips tokens of a text"
        refuse_settings(experiment, {reason: experiment.training.cls_only})

    def key(self, data: DataConfig) -> dict[str, Any]:
        """Name the version of what cuts images; see `TaskKind.key`."""
        try:
            return {"pillow": importlib.metadata.version("pillow")}
        except importlib.metadata.PackageNotFoundError:
            return {}

    def read(self, split: Split, data: DataConfig, task: Task) -> RawRows:
        """Read labels, and leave the images for `encode`; see `TaskKind.read`."""
        from fedpet.tasks.class_labels import encode_labels

        images = split.read().column(data.text_columns[0], "data.text-columns", split.where)
        labels = split.labels(data.label_column)
        codes = encode_labels(labels, "classification", task.label_names, split.where)
        return RawRows([images], codes, task.label_names, split.folder)

    def encode(self, rows: RawRows, how: Encoding) -> tuple[dict[str, Any], Padding]:
        """Cut the images to the model's size; see `TaskKind.encode`."""
        from fedpet.data.array_spool import ArraySpool
        from fedpet.data.images import read_image
        from fedpet.data.padding import Padding, config_of
        from fedpet.data.processors import load_image_processor

        processor, config = load_image_processor(how.folder), config_of(how.folder)
        pixels, shape = ArraySpool(np.uint8, how.spools), None
        for first in range(0, len(how.numbers), _STEP):
            some = how.numbers[first : first + _STEP].tolist()
            images = [
                read_image(rows.columns[0][n], rows.folder, f"row {n + 1} of {how.where}")
                for n in some
            ]
            made = processor(
                images=images, do_rescale=False, do_normalize=False, return_tensors="np"
            )["pixel_values"]
            if made.dtype != np.uint8 or (shape or made.shape[1:]) != made.shape[1:]:
                raise DataError(
                    f"the image processor in {str(how.folder)!r} makes {made.dtype} of shape "
                    f"{made.shape[1:]} of an image, and rows need bytes of one size: have it "
                    "resize or crop to one (size, crop_size) in preprocessor_config.json."
                )
            shape = made.shape[1:]
            pixels.append(made.reshape(-1))
            how.on_rows(first + len(some))
        assert shape is not None  # there is a row
        patch = getattr(config, "patch_size", None) or 16
        return {
            "pixels": pixels,
            "pixel_shape": np.array(shape),
            "pixel_norm": _scaling(processor, shape[0]),
            "tokens_each": np.array([1 + (shape[1] // patch) * (shape[2] // patch)]),
            "tokens": np.empty(0, dtype=np.int32),
            "offsets": np.zeros(len(how.numbers) + 1, dtype=np.int64),
            "labels": rows.labels[how.numbers],
        }, Padding(0)

    def tokenizer_hash(self, folder: Path) -> str:
        """Hash the image processor's settings; see `TaskKind.tokenizer_hash`."""
        from fedpet.data.processors import hash_processor

        return hash_processor(folder)


def _scaling(processor: Any, channels: int) -> np.ndarray:
    """Return the factor of a byte, then means and deviations of the channels."""
    mean, deviation = [0.0] * channels, [1.0] * channels
    if processor.do_normalize:
        mean, deviation = list(processor.image_mean), list(processor.image_std)
    factor = processor.rescale_factor if processor.do_rescale else 1.0
    return np.array([factor, *mean, *deviation], dtype=np.float64)
