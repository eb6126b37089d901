"""Read a data set of the Hugging Face hub by the library `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fedpet.data.column import Column
from fedpet.data.source import Source, first_line
from fedpet.data.split_table import Piece, Table
from fedpet.errors import DataError
from fedpet.utils.extras import check_extra

__all__ = ["HubDataset"]

_HUB_SECONDS = 10.0


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
                f"({first_line(error)}): check data.source, or log in if it is a private one."
            ) from None
        except Exception as error:  # whatever the HTTP library of the day raises
            raise DataError(
                f"{self.name!r} is no file or folder here, and the hub is out of reach "
                f"({first_line(error)}). Name a local file or folder with data.source, or set "
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
        raise DataError(f"{what} cannot be read: {first_line(cause)}") from None
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
