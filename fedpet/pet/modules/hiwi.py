"""Adapt pretrained weights and biases by HiWi's adapters, which are discarded after training.

In:  a dense module of the feed-forward part, with weight W0 (d_in, d_out) or bias b0 (d,).
Out: on a bias, b' = b + scale * f(b Wd) Wu; what is sent is b' - b0, (d,), whatever the rank.
     On a weight, W' = W0 + scale * f(W0 Wd) Wu; what is sent is Wu, (r, d_out).

On a bias, the adapter starts again at every start of a client's work, on the bias as it then is:
Wd drawn anew, Wu zero. So what is sent is always a bias, and averages exactly.

On a weight, Wd is frozen and drawn from the shared seed, and W0 is the pretrained weight, never
a masked or merged one. Then C = f(W0 Wd), (d_in, r), is a constant and the change C Wu is linear
in Wu: a LoRA whose down-projection was read off the weight. It costs no product of the size of W0.

f is ReLU, and Wd (with c, below) changes its sign where every channel of f would be 0 at the start:
such an adapter could never move. At rank 1 that is every second one.

A bias that is zero everywhere could never move, since f(0 Wd) = 0 and so is the
gradient of Wu. The rule: where the pretrained bias is all zeros the adapter gets inner biases,
b' = b + scale * (f(b Wd + c) Wu + e), c uniform at the start and e zero.

Source: Liao, Meng and Monz, ACL 2023, arXiv:2305.16742 (an adapter whose input is a weight or a
bias of a feed-forward layer, discarded after training). Ours: ReLU, one adapter a tensor, no inner
bias unless it is needed, and the exact federated forms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedpet.backbone.module_roles import Position
from fedpet.errors import ConfigError, StructureError
from fedpet.pet.modules.base import (
    GatedModule,
    dense_sizes,
    is_transposed,
    kaiming_uniform,
    seeded,
    value_dtype,
)
from fedpet.pet.modules.lora import LowRankBranch
from fedpet.pet.modules.module_config import ModuleConfig, check_rank
from fedpet.pet.modules.registry import DENSE, FFN, ModuleSpec, linears, register_module

__all__ = ["HiwiBias", "HiwiConfig", "HiwiWeight"]


@dataclass(frozen=True, kw_only=True)
class HiwiConfig(ModuleConfig):
    """HiWi: an adapter that reads a pretrained bias or weight and is folded into it.

    Attributes:
        r: Rank. On a bias, what is sent has the bias's length whatever the rank.
        on: "bias" or "weight".

    The usual modules are the dense layers of the feed-forward parts.
    """

    r: int = 8
    on: str = "bias"

    def __post_init__(self) -> None:
        check_rank(self, self.r)
        if self.on not in ("bias", "weight"):
            raise ConfigError(f"on of HiwiConfig must be 'bias' or 'weight', got {self.on!r}.")

    def kind_of_module(self) -> str:
        return f"hiwi-{self.on}"


def _has_bias(p: Position) -> bool:
    return linears(*FFN)(p) and p.has_bias


@register_module(
    "hiwi-bias",
    targets=DENSE,
    usual=_has_bias,
    size=lambda d_in, d_out, rank: d_out,
    config=HiwiConfig,
    ranked=True,
    tensor="bias",
    spaces={"mergeable": _has_bias},
    order=4,
)
class HiwiBias(GatedModule):
    """An adapter on a bias. Exact: it sends the merged change and starts anew each time."""

    place = "bias"

    def __init__(
        self, target: str, module: nn.Module, rank: int, scale: float, inner: bool | None = None
    ) -> None:
        """Read the pretrained bias.

        Args:
            target: Path of the module.
            module: Has a bias (d,).
            rank: r.
            scale: Of the change.
            inner: Whether there are inner biases c and e; None goes by the rule above, and is
                no where the bias is on the meta device and has no numbers.

        Raises:
            StructureError: The module has no bias.
        """
        super().__init__("hiwi-bias", target)
        bias = getattr(module, "bias", None)
        if not isinstance(bias, Tensor):
            raise StructureError(
                f"a 'hiwi-bias' module reads a bias, and {target!r} has none. Put it on another "
                "layer, or take 'hiwi-weight'."
            )
        self.carried = False  # a BitFit on the same bias holds and sends the change
        self._rank = rank
        self._scale = scale
        if inner is None:
            inner = not bias.is_meta and bool((bias == 0).all())
        self._inner = inner
        self._pretrained = bias.detach().to(value_dtype(bias.dtype), copy=True)
        self._origin = torch.zeros_like(self._pretrained)  # the values at the last start
        self._base = self._origin  # those of them that this module sends
        self._current = self._pretrained  # what the adapter reads

    @classmethod
    def build(cls, spec: ModuleSpec, module: nn.Module, seed: int) -> HiwiBias:
        return cls(spec.target, module, spec.rank, spec.scale)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        d, r = len(self._pretrained), self._rank
        return ((d, r), (r, d), (r,), (d,)) if self._inner else ((d, r), (r, d))

    @property
    def num_values(self) -> int:
        return 0 if self.carried else len(self._pretrained)

    def write(self, values: Tensor, seed: int) -> None:
        """Start anew at the bias `pretrained + values`, (d,)."""
        d, r = len(self._pretrained), self._rank
        self.count_from(values)
        generator = seeded(seed, self.target, "hiwi-bias")
        down, *others = (trainable.detach() for trainable in self.trainables)
        down.copy_(kaiming_uniform((d, r), d, generator))
        for other in others:
            other.zero_()
        if self._inner:
            others[1].copy_(kaiming_uniform((r,), d, generator, a=math.sqrt(5)))
        if not bool((self._active() > 0).any()):  # f's gradient would be 0 for ever
            for drawn in (down, others[1]) if self._inner else (down,):
                drawn.neg_()

    def _active(self) -> Tensor:
        """Compute f(b Wd + c), (r,)."""
        down, *others = self.trainables
        inside = self._current @ down
        return torch.relu(inside + others[1] if self._inner else inside)

    @property
    def origin(self) -> Tensor:
        """Return the values at the last start, (d,)."""
        return self._origin

    def count_from(self, origin: Tensor) -> None:
        self._origin = origin.to(self._pretrained, copy=True)
        self._current = self._pretrained + self._origin
        if not self.carried:
            self._base = self._origin

    @property
    def sends_trainables(self) -> bool:
        return False

    def sent(self) -> Tensor:
        return self.effect(None)

    def effect(self, x: Tensor | None) -> Tensor:
        change = self._active() @ self.trainables[1]
        if self._inner:
            change = change + self.trainables[3]
        change = change * self._scale
        return change if self.carried else self._base + change

    def merge(self, module: nn.Module) -> None:
        assert isinstance(module.bias, Tensor)
        module.bias.add_(self.effect(None))


@register_module(
    "hiwi-weight",
    targets=DENSE,
    usual=linears(*FFN),
    size=lambda d_in, d_out, rank: rank * d_out,  # the down-projection is frozen
    config=HiwiConfig,
    ranked=True,
    spaces={"mergeable": linears(*FFN)},
    order=2,
)
class HiwiWeight(LowRankBranch):
    """An adapter on a weight, its down-projection frozen and seeded. Exact."""

    def __init__(self, target: str, module: nn.Module, rank: int, scale: float, seed: int) -> None:
        _, d_out = dense_sizes(module)
        weight = module.weight
        assert isinstance(weight, Tensor)
        rows = weight.detach() if is_transposed(module) else weight.detach().T  # (d_in, d_out)
        down = kaiming_uniform((d_out, rank), d_out, seeded(seed, target, "hiwi-weight"))
        wide = value_dtype(weight.dtype)
        constant = torch.relu(rows.to(wide) @ down.to(weight.device, wide))  # C, (d_in, r)
        super().__init__("hiwi-weight", target, constant.T.contiguous(), d_out, scale)

    @classmethod
    def build(cls, spec: ModuleSpec, module: nn.Module, seed: int) -> HiwiWeight:
        return cls(spec.target, module, spec.rank, spec.scale, seed)
