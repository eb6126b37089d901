"""Give the bundled model and reviews as a user's own would be: a checkpoint's folder, a dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedpet.backbone.checkpoint import locate
from fedpet.config import BackboneConfig, DataConfig
from fedpet.data.film_reviews import FILM_LABELS
from fedpet.data.open_source import open_source

if TYPE_CHECKING:
    from datasets import DatasetDict

__all__ = ["bundled_model", "bundled_reviews"]


def bundled_model() -> str:
    """Return the folder of the bundled MiniLM, for `from_pretrained`.

    Raises:
        BackboneError: Its package is not installed.

    Example:
        >>> from transformers import AutoConfig
        >>> AutoConfig.from_pretrained(bundled_model()).hidden_size
        384
    """
    return str(locate(BackboneConfig()))


def bundled_reviews() -> DatasetDict:
    """Return sentences of film reviews: text, label (rotten or fresh) and film.

    Returns:
        The splits train, validation and test, of different films.

    Raises:
        DataError: Their package is not installed.

    Example:
        >>> bundled_reviews()["train"].column_names
        ['text', 'label', 'film']
    """
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    source = open_source(DataConfig().source)
    features = Features(
        text=Value("string"), label=ClassLabel(names=list(FILM_LABELS)), film=Value("string")
    )
    splits = {}
    for split in ("train", "validation", "test"):
        table = source.read(split)
        columns = {
            ours: list(table.column(theirs, theirs, split))
            for ours, theirs in (("text", "text"), ("label", "label"), ("film", "client"))
        }
        splits[split] = Dataset.from_dict(columns, features=features)
    return DatasetDict(splits)
