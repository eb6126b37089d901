"""Store the frozen dense weights of a model in 8 or 4 bits, and read them as plain numbers.

In:  a model, and the number of bits.
Out: the same model, each weight that a mask may choose from a `QuantisedWeight`; and back.

64 weights that follow each other in memory are a block with a scale of its own, their largest
magnitude. In 8 bits an entry is one of 255 equal steps up to it (LLM.int8's, Dettmers et al., 2022,
arXiv:2208.07339, whose blocks are rows), in 4 bits one of NF4's 16 levels (QLoRA, Dettmers et al.,
2023, arXiv:2305.14314, without a second quantisation of the scales). Both by bitsandbytes, always
on a CPU and from float32: each number comes of maxima and of single float32 operations, no sum
among them, so that every machine stores the same bits and reads the same float32 numbers.
bitsandbytes' own 8-bit blocks are not used: they round by a table whose index other processors
compute otherwise.

What a model computes with, its mask, its fingerprint and a merged model are those of the numbers
read: w0 is what the stored bits mean, and not what the checkpoint had.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fedpet.backbone.module_roles import is_dense, maskable_weights
from fedpet.utils.extras import check_extra

__all__ = ["BLOCK", "QuantisedWeight", "check_library", "dequantise", "plain", "quantise"]

BLOCK = 64  # weights with a scale of their own
_TYPE = "nf4"
_STRETCH = 1 << 12  # blocks that are quantised at a time
_STEP = 1 / 127  # of int8, to the largest magnitude


class QuantisedWeight(Tensor):
    """A frozen weight in few bits, which torch's functions read as the numbers they mean.

    It has the shape and the type of the weight it stands for. A function of torch that takes it
    gets a plain tensor made for that call; to write into it is an error.

    Attributes:
        stored: int8, (blocks, 64); or uint8, (blocks, 32), two entries a byte.
        scales: float32, (blocks,): the largest magnitude of each block.
        bits: 8 or 4.
    """

    stored: Tensor
    scales: Tensor
    bits: int

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # plain results

    @staticmethod
    def __new__(
        cls,
        stored: Tensor,
        scales: Tensor,
        bits: int,
        shape: torch.Size,
        dtype: torch.dtype,
    ) -> QuantisedWeight:
        """Take what `of` or an equal function computed."""
        made: QuantisedWeight = Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=stored.device
        )
        made.stored, made.scales, made.bits = stored, scales, bits
        return made

    @classmethod
    def of(cls, weight: Tensor, bits: int) -> QuantisedWeight:
        """Quantise a weight, on a CPU, whose number of entries is a multiple of `BLOCK`.

        Example:
            >>> half = QuantisedWeight.of(torch.linspace(-1, 1, 64).view(8, 8), 8)
            >>> half.shape, half.nbytes_stored
            (torch.Size([8, 8]), 68)
            >>> bool((plain(half) - torch.linspace(-1, 1, 64).view(8, 8)).abs().max() < 0.004)
            True
        """
        blocks = weight.detach().reshape(-1, BLOCK)
        scales = torch.empty(len(blocks))
        whole, kind = (BLOCK, torch.int8) if bits == 8 else (BLOCK // 2, torch.uint8)
        stored = torch.empty(len(blocks), whole, dtype=kind)
        for first in range(0, len(blocks), _STRETCH):  # what is made between times stays small
            here = slice(first, first + _STRETCH)
            stored[here], scales[here] = _quantised(blocks[here].float(), bits)
        return cls(stored, scales, bits, weight.shape, weight.dtype)

    @property
    def nbytes_stored(self) -> int:
        """Count the bytes that it takes in memory."""
        return self.stored.nbytes + self.scales.nbytes

    def dequantise(self) -> Tensor:
        """Compute the numbers, in a new tensor: in float32, then rounded to the weight's type."""
        if self.bits == 8:
            # As bitsandbytes' int8_vectorwise_dequant but for the order, in half the time.
            numbers = self.stored.float().mul_((self.scales * _STEP)[:, None])
        else:
            shape = (1, self.numel())
            numbers = torch.ops.bitsandbytes.dequantize_4bit(
                self.stored, self.scales, BLOCK, _TYPE, shape, torch.float32
            )
        return numbers.view(self.shape).to(self.dtype)

    def _with(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype) -> QuantisedWeight:
        stored, scales = change(self.stored), change(self.scales)
        return QuantisedWeight(stored, scales, self.bits, self.shape, dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own is a stub
        cls,
        function: Any,
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function on the numbers; copy or move the stored bits as they are."""
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        name = function.overloadpacket.__name__
        if isinstance(first, QuantisedWeight):
            if name in ("detach", "alias"):
                return first._with(lambda own: own, first.dtype)
            if name == "clone":
                return first._with(torch.clone, first.dtype)
            if name == "_to_copy":
                device, dtype = kwargs.get("device"), kwargs.get("dtype") or first.dtype
                return first._with(lambda own: own.to(device, copy=True), dtype)
        for own, declared in zip(args, function._schema.arguments, strict=False):
            written = declared.alias_info is not None and declared.alias_info.is_write
            if written and isinstance(own, QuantisedWeight):
                _refuse(name)
        read = tree_map_only(QuantisedWeight, QuantisedWeight.dequantise, (args, kwargs))
        return function(*read[0], **read[1])

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # untyped
        return f"QuantisedWeight({tuple(self.shape)}, {self.dtype}, bits={self.bits})"

    # By these torch moves a parameter of this class to a device.

    def __tensor_flatten__(self) -> tuple[list[str], tuple[int, torch.dtype]]:
        return ["stored", "scales"], (self.bits, self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, Tensor],
        context: tuple[int, torch.dtype],
        shape: torch.Size,
        stride: tuple[int, ...],
    ) -> QuantisedWeight:
        bits, dtype = context
        return QuantisedWeight(inner["stored"], inner["scales"], bits, shape, dtype)


def plain(weight: Tensor) -> Tensor:
    """Return a tensor's numbers: the tensor itself, but for a quantised weight."""
    return weight.dequantise() if isinstance(weight, QuantisedWeight) else weight


@torch.no_grad()
def quantise(model: nn.Module, bits: int, head: Collection[str] = ()) -> None:
    """Quantise the weights that a mask may choose from, in place, one after the other.

    Embeddings, norms, biases and the head stay as they are, as does a weight whose number of
    entries is no multiple of `BLOCK`.

    Args:
        model: Frozen, on a CPU.
        bits: 8 or 4.
        head: Names of the head's parameters.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    check_library(bits)
    names = [n for n, w in maskable_weights(model, head).items() if w.numel() % BLOCK == 0]
    owners = _owners(model)
    for name in names:
        weight = model.get_parameter(name)
        made = nn.Parameter(QuantisedWeight.of(weight, bits), requires_grad=False)
        for module in owners[id(weight)]:
            module.weight = made


@torch.no_grad()
def dequantise(model: nn.Module) -> None:
    """Make every quantised weight of a model a plain parameter, in place."""
    for modules in _owners(model).values():
        weight = modules[0].weight
        if isinstance(weight, QuantisedWeight):
            made = nn.Parameter(weight.dequantise(), requires_grad=False)
            for module in modules:
                module.weight = made


def check_library(bits: int) -> None:
    """Refuse quantised weights where the library is not installed.

    Raises:
        ConfigError: It is not.
    """
    check_extra("bitsandbytes", "quantised", f"backbone.bits = {bits}")


def _owners(model: nn.Module) -> dict[int, list[nn.Module]]:
    """List the dense modules by the identity of their weight, which several may share."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        if is_dense(module):
            owners.setdefault(id(module.weight), []).append(module)
    return owners


def _quantised(blocks: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return what is stored of float32 blocks, (n, 64): (n, 64) or (n, 32); and scales, (n,)."""
    if bits == 8:
        stored, scales, _ = _functions().int8_vectorwise_quant(blocks)
        stored.masked_fill_(scales[:, None] == 0, 0)  # of a block of zeros it is NaN's integer
        return stored, scales
    stored, state = _functions().quantize_4bit(blocks, blocksize=BLOCK, quant_type=_TYPE)
    return stored.view(len(blocks), -1), state.absmax


@functools.cache
def _functions() -> Any:
    """Import bitsandbytes, which warns of kernels that are not used here."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes.functional

    return bitsandbytes.functional


def _refuse(name: str) -> NoReturn:
    raise RuntimeError(f"a quantised weight is never written, and torch's {name} would write it")
