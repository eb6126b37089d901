"""Name small modules of a `PetConfig`: the base of each kind's configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedpet.backbone.module_roles import Position
from fedpet.errors import ConfigError
from fedpet.pet.modules.registry import KINDS, PRESETS, ModuleSpec, spec_of
from fedpet.pet.target_modules import TargetModules, choose_targets

__all__ = ["CustomModuleConfig", "ModuleConfig", "check_rank"]


@dataclass(frozen=True, kw_only=True)
class ModuleConfig:
    """One kind of small module, and where it goes.

    A kind's own configuration is a subclass that its `register_module` names. Fields `r` and
    `scale` are the rank and the scale of a kind that has them.

    Attributes:
        target_modules: None for the kind's usual modules; a list of names, of which each is a path,
            the end of one ("query", "output.dense") or a role ("ffn-up"); one string for
            "all-linear" or a regular expression that a whole path must match.
    """

    target_modules: TargetModules = None

    def kind_of_module(self) -> str:
        """Return the registered kind.

        Raises:
            ConfigError: No kind is registered with this configuration.
        """
        for kind, facts in KINDS.items():
            if facts.config is type(self):
                return kind
        raise ConfigError(
            f"{type(self).__name__} belongs to no kind of module: pass it as config to the "
            "register_module of one."
        )

    def specs(self, positions: Sequence[Position]) -> list[ModuleSpec]:
        """List the modules, one a target.

        Raises:
            StructureError: `target_modules` names nothing here that can carry them.
        """
        return self.specs_of(self.kind_of_module(), positions)

    def specs_of(self, kind: str, positions: Sequence[Position]) -> list[ModuleSpec]:
        """List the modules of one registered kind."""
        targets = choose_targets(
            positions,
            self.target_modules,
            kinds=KINDS[kind].targets,
            usual=PRESETS[kind][1],
            what=type(self).__name__,
        )
        rank, scale = getattr(self, "r", 0), getattr(self, "scale", 1.0)
        return [spec_of(kind, target, rank=rank, scale=scale) for target in targets]


def check_rank(config: ModuleConfig, rank: object) -> None:
    """Refuse a rank that is none.

    Raises:
        ConfigError: It is no whole number of at least 1.
    """
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ConfigError(
            f"r of {type(config).__name__} must be a whole number of at least 1, got {rank!r}."
        )


@dataclass(frozen=True, kw_only=True)
class CustomModuleConfig(ModuleConfig):
    """Any registered kind of module by its name, see `register_module`.

    Attributes:
        kind: The name.
        r: Rank, of a kind that has one.
        scale: Multiplies the change, of a kind that takes one.
    """

    kind: str
    r: int = 8
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_rank(self, self.r)
        if self.kind not in KINDS:
            raise ConfigError(
                f"kind of CustomModuleConfig must be a registered one ({', '.join(KINDS)}), got "
                f"{self.kind!r}. Import the module that registers it."
            )

    def kind_of_module(self) -> str:
        return self.kind
