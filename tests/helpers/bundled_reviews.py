"""The bundled checkpoint and a few of the bundled reviews, as a reader's own model and data."""

from __future__ import annotations

from collections import Counter

from datasets import Dataset, DatasetDict

from fedpet.backbone.checkpoint import locate
from fedpet.config import BackboneConfig, DataConfig
from fedpet.data.sources import open_source


def bundled_checkpoint() -> str:
    """Return the folder of the bundled MiniLM."""
    return str(locate(BackboneConfig()))


def small_reviews(*, films: int = 12, rows: int = 8, test_rows: int = 40) -> DatasetDict:
    """Return reviews of a few films, with the columns text, label and film."""
    train = _split("train")
    counts = Counter(train["film"])
    chosen = sorted(film for film, count in counts.items() if count >= rows)[:films]
    indices = [
        index
        for film in chosen
        for index in [i for i, other in enumerate(train["film"]) if other == film][:rows]
    ]
    return DatasetDict(train=train.select(indices), test=_split("test").select(range(test_rows)))


def _split(name: str) -> Dataset:
    return open_source(DataConfig().source).read(name).dataset().rename_column("client", "film")
