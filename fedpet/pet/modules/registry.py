"""Register kinds of PET modules: every fact of a kind stands at its class, and nowhere else.

In:  a `GatedModule` class and its facts.
Out: `KINDS` and `PRESETS`, which configurations, structure, model, search, estimate and report
     read; a `ModuleSpec` names one module of a registered kind.

See `register_module` for an example.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from fedpet.backbone.module_roles import Position
from fedpet.config.module_kinds import add_kind
from fedpet.errors import ConfigError, StructureError

if TYPE_CHECKING:
    from fedpet.pet.modules.base import GatedModule
    from fedpet.pet.modules.module_config import ModuleConfig

__all__ = [
    "ALL_LINEAR",
    "DENSE",
    "FFN",
    "KINDS",
    "PRESETS",
    "ModuleKind",
    "ModuleSpec",
    "linears",
    "register_module",
    "register_preset",
    "spec_of",
]

DENSE = frozenset({"linear", "conv1d"})  # kinds of positions
# Roles.
FFN = ("ffn-up", "ffn-gate", "ffn-down")
ALL_LINEAR = (
    *("query", "key", "value", "query-key-value", "attention-output", *FFN),
    "other-linear",
)

_Wanted = Callable[[Position], bool]


@dataclass(frozen=True)
class ModuleKind:
    """The facts of one kind of module.

    Attributes:
        build: Makes one from its spec, its target module and the seed of the federation.
        config: The dataclass that names such modules in a `PetConfig`; None where only
            `CustomModuleConfig` does.
        exact: Whether averaging what it sends is averaging models (law 3).
        targets: Kinds of positions that can carry it.
        size: Values that it sends, of the target's input and output widths and the rank.
        ranked: Whether it has a rank.
        scaled: Whether `structure.scale` multiplies it; the scale of others is 1.
        tensor: The target's tensor that it changes, where other kinds change the same one: then
            that is sent once. "" where it shares none.
        spaces: Search spaces that it is in, and on which positions.
        order: Among the candidates of one position: lower ones come first.
    """

    build: Callable[[ModuleSpec, nn.Module, int], GatedModule]
    config: type[ModuleConfig] | None
    exact: bool
    targets: frozenset[str]
    size: Callable[[int, int, int], int]
    ranked: bool
    scaled: bool
    tensor: str
    spaces: dict[str, _Wanted]
    order: int


KINDS: dict[str, ModuleKind] = {}
# name -> (kind, its usual positions); a kind's own name is one
PRESETS: dict[str, tuple[str, _Wanted]] = {}


@dataclass(frozen=True)
class ModuleSpec:
    """One small module."""

    kind: str  # of `KINDS`
    target: str  # path of the module it acts on
    rank: int = 0  # of the ranked kinds, at least 1; of the others 0
    scale: float = 1.0  # multiplies the change of the ranked kinds; LoRA's alpha / rank

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise StructureError(
                f"a module's kind must be one of {', '.join(sorted(KINDS))}, got {self.kind!r}."
            )
        ranked = KINDS[self.kind].ranked
        if ranked != (self.rank >= 1):
            wanted = "at least 1" if ranked else "0"
            raise StructureError(
                f"the rank of a {self.kind!r} module must be {wanted}, got {self.rank!r} on "
                f"{self.target!r}."
            )
        if not 0 < self.scale < math.inf:
            raise StructureError(
                f"the scale of a module must be above 0 and finite, got {self.scale!r} on "
                f"{self.target!r}."
            )


def spec_of(kind: str, target: str, *, rank: int, scale: float) -> ModuleSpec:
    """Give a module the rank and the scale where its kind has them."""
    facts = KINDS[kind]
    return ModuleSpec(kind, target, rank if facts.ranked else 0, scale if facts.scaled else 1.0)


_Class = TypeVar("_Class", bound="type[GatedModule]")


def register_module(
    kind: str,
    *,
    targets: Collection[str],
    usual: _Wanted,
    size: Callable[[int, int, int], int],
    config: type[ModuleConfig] | None = None,
    ranked: bool = False,
    scaled: bool = False,
    tensor: str = "",
    spaces: dict[str, _Wanted] | None = None,
    order: int = 100,
) -> Callable[[_Class], _Class]:
    """Make a `GatedModule` class known under a name.

    Its `build` is called with a `ModuleSpec`, the target and a seed; `exact` stands on the class.

    Args:
        kind: The name in structures, presets and learning rates.
        targets: Kinds of positions that can carry it: "linear", "conv1d", "norm", "block".
        usual: The positions that the preset of that name takes.
        size: Values that it sends, of (input width, output width, rank).
        config: See `ModuleKind`, as the others.

    Raises:
        ConfigError: The name is taken by another class.

    Example:
        (IA)^3 on any dense layer: its output times 1 + v, which folds into weight and bias.

        >>> class Ia3Config(ModuleConfig):
        ...     pass  # target_modules alone; a rank would be a field r
        >>> @register_module("ia3", targets={"linear"}, usual=linears("key", "value", "ffn-up"),
        ...                  size=lambda d_in, d_out, rank: d_out, config=Ia3Config)
        ... class Ia3(GatedModule):
        ...     place = "sequential"
        ...     def __init__(self, target, width):
        ...         super().__init__("ia3", target)
        ...         self._width = width
        ...     @classmethod
        ...     def build(cls, spec, module, seed):
        ...         return cls(spec.target, module.out_features)
        ...     @property
        ...     def shapes(self):
        ...         return ((self._width,),)
        ...     def effect(self, output):
        ...         return output * self.trainables[0]
        ...     def merge(self, module):
        ...         module.weight.mul_(1 + self.trainables[0][:, None])
        ...         if module.bias is not None:
        ...             module.bias.mul_(1 + self.trainables[0])
        >>> PetConfig(modules=[Ia3Config(target_modules=["value"])]).modules[0].kind_of_module()
        'ia3'
    """

    def register(cls: _Class) -> _Class:
        facts = ModuleKind(
            cls.build,
            config,
            cls.exact,
            frozenset(targets),
            size,
            ranked,
            scaled,
            tensor,
            dict(spaces or {}),
            order,
        )
        known = KINDS.get(kind)
        if known is not None and known.build.__qualname__ != cls.build.__qualname__:
            raise ConfigError(
                f"a kind of module must have a name of its own, and {kind!r} is "
                f"{known.build.__qualname__.removesuffix('.build')}. Take another."
            )
        KINDS[kind] = facts
        add_kind(kind)
        register_preset(kind, kind, usual)
        return cls

    return register


def register_preset(name: str, kind: str, usual: _Wanted) -> None:
    """Name positions on which a registered kind may be put."""
    PRESETS[name] = (kind, usual)


def linears(*roles: str) -> _Wanted:
    """Select dense layers of these roles; all, where none is named.

    Example:
        >>> from fedpet.backbone.module_roles import Position
        >>> query = Position("layer.0.query", "linear", "query", 0, "encoder", 8, 8, True)
        >>> linears("query", "value")(query), linears("ffn-up")(query), linears()(query)
        (True, False, True)
    """
    return lambda p: p.kind in DENSE and (not roles or p.role in roles)
