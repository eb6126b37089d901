"""A second device that every machine has: tensors that say they lie on torch's meta device.

Their numbers lie on the processor, where every operation runs. What a GPU refuses is refused: an
operation on tensors of both devices, but for single numbers, indices and copies; and looking at
numbers without fetching them. So code that is right here puts nothing in the wrong place; it says
nothing about a GPU's own kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

NAME = "meta"
_COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
_CROSSING = (*_COPIES, torch.ops.aten.index.Tensor)


@contextmanager
def second_device() -> Iterator[torch.device]:
    """Within it, tensors can be made there, and moved there."""
    plain = torch.is_autocast_enabled

    def enabled(kind: str = "cpu") -> bool:
        return kind != NAME and plain(kind)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "is_autocast_enabled", enabled))
        fused = "torch.optim.optimizer._get_fused_kernels_supported_devices"
        stack.enter_context(mock.patch(fused, return_value=["cpu", "cuda", NAME]))
        # Nothing that inference mode makes can be wrapped.
        stack.enter_context(mock.patch.object(torch, "inference_mode", torch.no_grad))
        stack.enter_context(_Mode())
        yield torch.device(NAME)


class _There(Tensor):
    """A tensor that says it lies on the second device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> _There:
        options: dict[str, Any] = {"dtype": inner.dtype, "device": NAME}
        if inner.layout == torch.strided:
            options |= {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        made: _There = Tensor._make_wrapper_subclass(cls, inner.size(), **options)
        made.inner = inner
        return made

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, other: _There) -> None:
        Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.inner = other.inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"on the second device: {self.inner!r}"


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    there = any(map(_is_there, tensors))
    here = any(not _is_there(x) and x.dim() and x.numel() for x in tensors)
    if there and here and func not in _CROSSING:
        raise RuntimeError(f"{func} on tensors of two devices: {tensors}")
    if there and torch.Tag.inplace_view in func.tags:  # of what it says of itself, too
        with no_dispatch():
            func(*args, **kwargs)
    if func is torch.ops.aten.copy_.default:
        there = _is_there(args[0])
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == NAME
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map_only(Tensor, _inner, (args, kwargs))
    result = func(*args, **kwargs)
    return tree_map_only(Tensor, _There, result) if there else result


def _is_there(x: Tensor) -> bool:
    return isinstance(x, _There) or x.is_meta  # torch.tensor([], device=...) asks nobody


def _inner(x: Tensor) -> Tensor:
    if isinstance(x, _There):
        return x.inner
    return torch.empty_like(x, device="cpu") if x.is_meta else x
