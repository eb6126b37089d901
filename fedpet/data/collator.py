"""Make a batch by a user's data collator, as `transformers.Trainer` does.

In:  rows as dicts, and a registered function or object that is called with a list of them.
Out: the batch's tensors by name. Without a collator `Rows.batch` pads on its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from fedpet.errors import ConfigError
from fedpet.utils.named_callables import NamedCallables

__all__ = ["COLLATORS", "Collator", "collate", "register_data_collator"]

LOG = logging.getLogger("fedpet")

# Of a list of rows: a mapping of tensors, "labels" among them.
Collator = Callable[[list[dict[str, Any]]], Any]
_Collator = TypeVar("_Collator", bound=Collator)

COLLATORS: NamedCallables[Collator] = NamedCallables(
    "data collator", "fedpet.register_data_collator", only_registered=True
)


def register_data_collator(name: str) -> Callable[[_Collator], _Collator]:
    """Make a data collator known by a name, for `data.collator`.

    It is called with a list of rows: dicts of "input_ids", "attention_mask", "token_type_ids" where
    the tokeniser makes them, and "labels", the row's one. It returns a mapping of tensors, "labels"
    among them; all others go to the model by their names. Equal rows must give an equal batch.
    Nodes and Ray's workers import it, so it must stand in a module that they can import; there the
    same key may also name it as "package.module:function".

    Args:
        name: The name.

    Raises:
        ConfigError: The name belongs to another collator.

    Example:
        >>> import torch
        >>> @register_data_collator("first_token")
        ... def first_token(features):
        ...     ids = torch.tensor([row["input_ids"][:1] for row in features])
        ...     labels = torch.tensor([row["labels"] for row in features])
        ...     return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    """

    def register(function: _Collator) -> _Collator:
        COLLATORS.add(name, function)
        return function

    return register


def collate(collator: Collator, features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Make a batch of rows.

    Raises:
        ConfigError: The collator fails, or returns what is no batch of these rows.
    """
    try:
        batch = dict(collator([*features]))
    except Exception as error:  # whatever a stranger's function raises; it may quote rows
        LOG.warning("the data collator failed", exc_info=error)
        raise ConfigError(
            f"the data collator failed on {len(features)} rows with {type(error).__name__}: see "
            "the log of where it ran."
        ) from None
    labels = batch.get("labels")
    if not all(isinstance(value, Tensor) for value in batch.values()) or (
        labels is None or len(labels) != len(features)
    ):
        raise ConfigError(
            f'a data collator must return a mapping of tensors, "labels" of the {len(features)} '
            f"rows among them, got { {str(k): type(v).__name__ for k, v in batch.items()} }"
            + (f" with {len(labels)} labels." if isinstance(labels, Tensor) else ".")
        )
    return batch
