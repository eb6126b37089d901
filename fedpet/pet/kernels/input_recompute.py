"""Recompute the input of a masked layer, so that it need not be stored for the backward pass.

In:  the input of a dense layer, in the forward pass.
Out: the same numbers in the backward pass, as rows or as columns, for the sampled product.

A layer with a frozen weight stores no input; a masked one needs its input again. Most inputs are
the output of a norm or an activation, whose own input autograd stores anyway: such an output
carries the function that makes it, and that alone is stored. To run it again is elementwise work,
a percent or two of a step, and training takes the memory of frozen weights. So with a product of
two tensors, as of a gated feed-forward part: autograd stores both factors, and they are multiplied
again.

Layers that read one input (query, key, value) share one `SavedInput`, which is made, and
transposed, once.

The sampled product wants both factors as contiguous columns, (features, tokens). To transpose the
wide inner activations of a feed-forward part would cost more than the product, so there the layers
write their output in columns (see `dense`), and the activation in between takes columns.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "COLLIDING",
    "SavedInput",
    "activation_forward",
    "in_columns",
    "norm_forward",
    "save_input",
    "to_columns",
]


COLLIDING = 512  # float32 tokens: 2 KiB
STRIPE = 64  # tokens

_Make = Callable[[Tensor], Tensor]


class SavedInput:
    """An input of dense layers: itself, or how to make it again.

    The tensor it starts from, `source`, lies with autograd (`save_for_backward`), which watches
    it for changes and frees it; what is made from it stays here until its last reader is done.
    """

    def __init__(self, make: _Make | None, *, is_whole: bool = False) -> None:
        """Begin without readers.

        Args:
            make: Makes the input of the source; None where the source is the input.
            is_whole: It makes all tokens, whatever it is given.
        """
        self.readers = 0  # layers whose backward is still to come
        self._make, self._is_whole = make, is_whole
        self._columns: Tensor | None = None

    def rows(self, source: Tensor, dtype: torch.dtype, live: Tensor | None = None) -> Tensor:
        """Make (tokens, in), of any strides; of the tokens `live` alone where they are given."""
        if live is not None and not self._is_whole:
            source = source.reshape(-1, source.shape[-1])[live]
        x = source if self._make is None else self._make(source)
        x = x.reshape(-1, x.shape[-1])
        if live is not None and self._is_whole:
            x = x[live]
        return x if x.dtype == dtype else x.to(dtype)

    def columns(self, source: Tensor, dtype: torch.dtype) -> Tensor:
        """Make (in, tokens), contiguous."""
        if self._columns is not None:
            return self._columns
        columns = to_columns(self.rows(source, dtype))
        if self.readers > 1:
            self._columns = columns
        return columns

    def release(self) -> None:
        """Note that one reader is done; after the last, free what was made."""
        self.readers -= 1
        if self.readers <= 0:
            self._columns = None


def save_input(x: Tensor) -> tuple[SavedInput, Tensor]:
    """Return the record of `x` for one more layer that reads it, and the tensor to save."""
    version = x._version
    known: tuple[SavedInput, Tensor, int] | None = getattr(x, "_fedpet_saved", None)
    if known is None or known[2] != version:
        remake: tuple[_Make, Tensor, int] | None = getattr(x, "_fedpet_remake", None)
        if remake is not None and remake[2] == version:
            known = (SavedInput(remake[0]), remake[1].detach(), version)
        elif (product := _product(x)) is not None:
            known = (SavedInput(product, is_whole=True), x.detach().new_empty(0), version)
        else:
            known = (SavedInput(None), x.detach(), version)
        x._fedpet_saved = known  # type: ignore[attr-defined]
    saved, source, _ = known
    saved.readers += 1
    return saved, source


def _product(x: Tensor) -> _Make | None:
    """Return a way to multiply the two factors of `x` again; None where `x` is no such product.

    Autograd's node stores them until its own backward, which comes after that of the layers that
    read `x`. Where something else decides what is stored (checkpointing does), it gives each factor
    once, to that node.
    """
    node = x.grad_fn
    if node is None or node.name() != "MulBackward0" or _stored_elsewhere():
        return None
    factors: Any = node
    one, other = factors._saved_self, factors._saved_other
    if one is None or other is None or not x.shape == one.shape == other.shape:
        return None
    if not x.dtype == one.dtype == other.dtype:
        return None
    return lambda _: factors._saved_self * factors._saved_other


def _stored_elsewhere() -> bool:
    """Tell whether hooks stand between autograd and the tensors that it stores."""
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return hooks is None or hooks(False) is not None


def norm_forward(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of a norm that marks its output with a way to make it again."""

    def forward(x: Tensor) -> Any:
        y = plain(x)
        if y.requires_grad and not torch.is_autocast_enabled(x.device.type):
            y._fedpet_remake = (plain, x, y._version)
        return y

    return forward


def activation_forward(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return the same of an activation, which also takes columns as they lie."""

    def apply(x: Tensor) -> Any:
        if in_columns(x):
            return plain(x.view(-1, x.shape[-1]).T).T.view(x.shape)
        return plain(x)

    return norm_forward(apply)


def in_columns(x: Tensor) -> bool:
    """Tell whether (..., features) lies in memory as (features, tokens)."""
    return x.dim() > 1 and x.stride(-2) == 1 and x.stride(-1) == x.numel() // x.shape[-1] > 1


def to_columns(rows: Tensor) -> Tensor:
    """Transpose (tokens, features) to contiguous (features, tokens).

    torch copies a transposed matrix number by number. As an image of one pixel, whose channels lie
    one behind the other, its channels are shuffled by the same permutation in blocks of registers:
    the same numbers in a half to a fifth of the time. Columns that lie a multiple of 2 KiB apart
    fall into the same few lines of the cache, which costs four times as much: there each
    `STRIPE` tokens are a pixel of their own, and the stripes are laid side by side afterwards.
    """
    tokens, features = rows.shape
    size = tokens * features
    plain = rows.dtype == torch.float32 and rows.device.type == "cpu" and rows.is_contiguous()
    if not plain or not size:
        return rows.t().contiguous()
    if tokens % COLLIDING:
        return _shuffled(rows, 1).view(features, tokens)
    stripes = _shuffled(rows, tokens // STRIPE).view(-1, features, STRIPE)
    return stripes.transpose(0, 1).reshape(features, tokens)


def _shuffled(rows: Tensor, pixels: int) -> Tensor:
    """Transpose each of so many runs of rows, and lay them one behind the other: flat."""
    size = rows.numel() // pixels
    image = rows.as_strided((1, size, 1, pixels), (rows.numel(), 1, rows.numel(), size))
    shuffled = nn.functional.channel_shuffle(image, len(rows) // pixels)
    return shuffled.as_strided((rows.numel(),), (1,))
