"""What a masked layer keeps of its input, so that keeping costs next to nothing.

In:  the input of a dense layer, in the forward pass.
Out: the same numbers in the backward pass, as rows or as columns, for the sampled product.

A layer whose weight is frozen keeps nothing; a masked one needs its input again. Most inputs are
the output of a norm or of an activation, whose own input autograd keeps anyway: such an output is
marked with how to make it again, and only that is kept. Making it again is elementwise work, a
percent or two of a step, and the memory of training stays that of frozen weights.

Layers that read one input (query, key, value) share one `Kept`: it is made, and transposed, once.

The sampled product wants both factors as columns, each (features, tokens) and contiguous.
Transposing the wide inner activations of a feed-forward part would cost more than the product, so
there the layers write their output in columns to begin with (see `masked`), and the activation in
between is applied to the columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Kept", "activation_forward", "in_columns", "keep", "norm_forward"]

class Kept:
    """An input of dense layers: itself, or how to make it again."""

    def __init__(
        self, source: Tensor, make: Callable[[Tensor], Tensor] | None, output_version: int
    ) -> None:
        self.output_version = output_version  # of the input, when it was first read
        self.readers = 0  # layers whose backward is still to come
        self._source: Tensor | None = source.detach()
        self._source_version = source._version
        self._make = make
        self._rows: Tensor | None = None
        self._columns: Tensor | None = None

    def rows(self, dtype: torch.dtype) -> Tensor:
        """(tokens, in), of any strides."""
        if self._rows is None:
            source = self._source
            if source is None:
                raise RuntimeError(
                    "a masked layer's backward may run once for each forward pass, and ran "
                    "again: its input was released after the first. Run the forward pass again."
                )
            if source._version != self._source_version:
                raise RuntimeError(
                    "the input of a masked layer must stay as it is until backward, and was "
                    "changed in place."
                )
            x = source if self._make is None else self._make(source)
            self._rows = x.reshape(-1, x.shape[-1]).to(dtype)
        return self._rows

    def columns(self, dtype: torch.dtype) -> Tensor:
        """(in, tokens), contiguous."""
        if self._columns is None:
            self._columns = self.rows(dtype).T.contiguous()
            self._rows = None
        return self._columns

    def release(self) -> None:
        """One reader is done; after the last, nothing is held."""
        self.readers -= 1
        self._rows = None
        if self.readers <= 0:
            self._source = self._columns = None


def keep(x: Tensor) -> Kept:
    """What to keep of `x`, for one more layer that reads it."""
    kept: Kept | None = getattr(x, "_fedpet_kept", None)
    if kept is None or kept.readers <= 0 or kept.output_version != x._version:
        make: Callable[[Tensor], Tensor] | None
        make, source, version = getattr(x, "_fedpet_remake", (None, x, x._version))
        kept = Kept(source, make, version) if version == x._version else Kept(x, None, x._version)
        x._fedpet_kept = kept  # type: ignore[attr-defined]
    kept.readers += 1
    return kept


def norm_forward(plain: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a norm that marks its output with how to make it again."""

    def forward(x: Tensor) -> Any:
        y = plain(x)
        if y.requires_grad and not torch.is_autocast_enabled(x.device.type):
            y._fedpet_remake = (plain, x, y._version)
        return y

    return forward


def activation_forward(plain: Callable[..., Any]) -> Callable[..., Any]:
    """The same of an activation, which is also applied to columns as they lie."""

    def apply(x: Tensor) -> Any:
        if in_columns(x):
            return plain(x.view(-1, x.shape[-1]).T).T.view(x.shape)
        return plain(x)

    return norm_forward(apply)


def in_columns(x: Tensor) -> bool:
    """Whether (..., features) lies in memory as (features, tokens)."""
    return x.dim() > 1 and x.stride(-2) == 1 and x.stride(-1) == x.numel() // x.shape[-1] > 1
