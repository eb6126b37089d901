"""Leave out of a model's passes what no output depends on: padding, and tokens that go unread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING
from weakref import WeakSet

import numpy as np
from torch import nn

from fedpet.backbone.device import device_of
from fedpet.training.batching import inputs_of
from fedpet.training.block_checkpointing import recomputes_blocks
from fedpet.training.cls_only import first_token_only, reads_first_token
from fedpet.training.token_packing import packed_tokens

if TYPE_CHECKING:
    from fedpet.data import Rows

__all__ = ["lean_passes"]

_lean: WeakSet[nn.Module] = WeakSet()


@contextmanager
def lean_passes(
    model: nn.Module, rows: Rows, *, cls_only: bool | None = None, padding_free: bool = True
) -> Iterator[None]:
    """Cut this model's passes within the context; logits are the same up to rounding.

    Within another such context of the model it does nothing: a node enters one for many clients,
    since putting the hooks on takes as long as much else of a client.

    Args:
        model: In training or evaluation mode.
        rows: What it is called with, to try it on. Where tokens are or have labels, nothing is
            cut: all are read, and packing is for attention without an order. Nor for images.
        cls_only: Compute of the last block what the first token needs; None where that can be done.
        padding_free: Compute nothing for padding where that can be done.

    Raises:
        ConfigError: It is asked for, and cannot be done.
    """
    if model in _lean or rows.has_token_labels or rows.decoder_start >= 0 or rows.dense is not None:
        yield
        return
    device = device_of(model)
    packed: AbstractContextManager[None] = nullcontext()
    one = inputs_of(rows, np.arange(1), device)[0]
    if cls_only is None:
        cls_only = reads_first_token(model, one)
    if padding_free and not recomputes_blocks(model):  # in backward, when packing is over
        packed = packed_tokens(model, rows, last_block=not cls_only)
    cut = first_token_only(model, one) if cls_only else nullcontext()
    with packed, cut:
        _lean.add(model)
        try:
            yield
        finally:
            _lean.discard(model)
