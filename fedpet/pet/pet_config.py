"""Configure all that trains of a model, in peft's words: mask, small modules, what trains in full.

The configurations of single kinds of modules stand beside these, in fedpet/pet/modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedpet.backbone.module_roles import Position
from fedpet.config import MaskConfig
from fedpet.errors import ConfigError
from fedpet.pet.modules.module_config import ModuleConfig
from fedpet.pet.structure import Structure

__all__ = ["PetConfig"]


@dataclass(frozen=True, kw_only=True)
class PetConfig:
    """All that trains of a model.

    Attributes:
        mask: Entries of the dense weights; None for none, or for those that a `Structure` counts.
        modules: Small modules; or a `Structure`, as a search finds it.
        modules_to_save: Modules that train in full, by path or its end. None takes the head of a
            model that classifies, regresses or marks spans: all that stands beside the encoder. A
            language model's head is pretrained, and is left alone. [] trains none.
        seed: Of all that is drawn: LoRA's A, HiWi's down-projections.

    Example:
        >>> PetConfig(mask=MaskConfig(density=0.001), modules=[LoraConfig(r=2)]).mask.density
        0.001
    """

    mask: MaskConfig | None = None
    modules: Sequence[ModuleConfig] | Structure = ()
    modules_to_save: Sequence[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.modules_to_save, str):
            raise ConfigError(
                f"modules_to_save must be a list of names, got {self.modules_to_save!r}. Write "
                f"[{self.modules_to_save!r}]."
            )
        for module in () if isinstance(self.modules, Structure) else self.modules:
            if not isinstance(module, ModuleConfig):
                raise ConfigError(
                    f"modules must be configurations such as LoraConfig(r=8), got {module!r}."
                )

    def mask_of(self, structure: Structure) -> MaskConfig | None:
        """Return the mask's settings: those of a structure's counts where no others are given."""
        if self.mask is None and structure.mask is not None:
            return structure.mask.config()
        return self.mask

    def structure(self, positions: Sequence[Position]) -> Structure:
        """List the modules and their targets in a model of these positions.

        Raises:
            StructureError: A target that is not there, or two modules of one kind on one target.
        """
        if isinstance(self.modules, Structure):
            return self.modules
        return Structure(tuple(spec for module in self.modules for spec in module.specs(positions)))
