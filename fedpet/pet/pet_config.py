"""Say what of a model trains: dataclasses in peft's words.

In:  densities, ranks, names of modules.
Out: a `PetConfig`, which `get_pet_model` puts on a model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from fedpet.backbone.module_roles import Position
from fedpet.config import MaskConfig
from fedpet.errors import ConfigError, StructureError
from fedpet.pet.modules.registry import KINDS, PRESETS
from fedpet.pet.structure import ModuleSpec, Structure, spec_of
from fedpet.pet.target_modules import TargetModules, choose_targets

__all__ = [
    "AdapterConfig",
    "BitFitConfig",
    "CustomModuleConfig",
    "HiwiConfig",
    "LayerNormConfig",
    "LoraConfig",
    "ModuleConfig",
    "PetConfig",
]


@dataclass(frozen=True, kw_only=True)
class ModuleConfig(ABC):
    """One kind of small module, and where it goes.

    Attributes:
        target_modules: None for the kind's usual modules; a list of names, of which each is a path,
            the end of one ("query", "output.dense") or a role ("ffn-up"); one string for
            "all-linear" or a regular expression that a whole path must match.
    """

    target_modules: TargetModules = None

    @abstractmethod
    def specs(self, positions: Sequence[Position]) -> list[ModuleSpec]:
        """List the modules, one a target.

        Raises:
            StructureError: `target_modules` names nothing here that can carry them.
        """

    def _specs(
        self, positions: Sequence[Position], kind: str, *, rank: int = 0, scale: float = 1.0
    ) -> list[ModuleSpec]:
        """The modules of one registered kind."""
        targets = choose_targets(
            positions,
            self.target_modules,
            kinds=KINDS[kind].targets,
            usual=PRESETS[kind][1],
            what=type(self).__name__,
        )
        return [ModuleSpec(kind, target, rank, scale) for target in targets]


def _check_rank(config: ModuleConfig, rank: object) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ConfigError(
            f"r of {type(config).__name__} must be a whole number of at least 1, got {rank!r}."
        )


@dataclass(frozen=True, kw_only=True)
class LoraConfig(ModuleConfig):
    """LoRA: a low-rank change of a dense weight.

    Attributes:
        r: Rank.
        lora_alpha: The change is multiplied by lora_alpha / r.
        freeze_a: A is drawn from the seed, and B alone is trained and sent: then the mean of the
            clients' values is the mean of their models. False trains both factors, as peft does.

    The usual modules are the projections to queries and values.

    Example:
        >>> LoraConfig(r=4, target_modules=["query", "ffn-up"]).scale
        4.0
    """

    r: int = 8
    lora_alpha: float = 16.0
    freeze_a: bool = True

    def __post_init__(self) -> None:
        _check_rank(self, self.r)
        if not self.lora_alpha > 0 or self.lora_alpha == float("inf"):
            raise ConfigError(
                f"lora_alpha must be above 0 and finite, got {self.lora_alpha!r}. The change is "
                "multiplied by lora_alpha / r."
            )

    @property
    def scale(self) -> float:
        return self.lora_alpha / self.r

    def specs(self, positions: Sequence[Position]) -> list[ModuleSpec]:
        kind = "lora" if self.freeze_a else "lora-factors"
        return self._specs(positions, kind, rank=self.r, scale=self.scale)


@dataclass(frozen=True, kw_only=True)
class LayerNormConfig(ModuleConfig):
    """Gains and biases of norms; an RMS norm has a gain alone.

    Attributes:
        weight: Train the gains.
        bias: Train the biases, where there are some.
    """

    weight: bool = True
    bias: bool = True

    def __post_init__(self) -> None:
        if not (self.weight or self.bias):
            raise ConfigError("LayerNormConfig must train weight, bias or both, got neither.")

    def specs(self, positions: Sequence[Position]) -> list[ModuleSpec]:
        biased = {position.name for position in positions if position.has_bias}
        gains = self._specs(positions, "lnfit")
        biases = [ModuleSpec("ln-bias", gain.target) for gain in gains if gain.target in biased]
        if not self.weight and not biases:
            raise StructureError(
                "LayerNormConfig(weight=False) trains biases of norms, and those that it names "
                "have none in this model: train their gains with weight=True."
            )
        return [*(gains if self.weight else ()), *(biases if self.bias else ())]


@dataclass(frozen=True, kw_only=True)
class BitFitConfig(ModuleConfig):
    """Biases of dense layers; a named layer that has none gets one.

    The usual modules are the dense layers with a bias, but for keys (softmax cancels theirs) and
    the pooler.
    """

    def specs(self, positions: Sequence[Position]) -> list[ModuleSpec]:
        return self._specs(positions, "bitfit")


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
        _check_rank(self, self.r)
        if self.on not in ("bias", "weight"):
            raise ConfigError(f"on of HiwiConfig must be 'bias' or 'weight', got {self.on!r}.")

    def specs(self, positions: Sequence[Position]) -> list[ModuleSpec]:
        return self._specs(positions, f"hiwi-{self.on}", rank=self.r)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(ModuleConfig):
    """S3PET's low-rank adapter after attention and feed-forward parts.

    It stays in the merged model and adds latency, and averaging its values is not averaging models.

    Attributes:
        r: Rank of its factors.
    """

    r: int = 8

    def __post_init__(self) -> None:
        _check_rank(self, self.r)

    def specs(self, positions: Sequence[Position]) -> list[ModuleSpec]:
        return self._specs(positions, "lowrank-adapter", rank=self.r)


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
        _check_rank(self, self.r)
        if self.kind not in KINDS:
            raise ConfigError(
                f"kind of CustomModuleConfig must be a registered one ({', '.join(KINDS)}), got "
                f"{self.kind!r}. Import the module that registers it."
            )

    def specs(self, positions: Sequence[Position]) -> list[ModuleSpec]:
        named = spec_of(self.kind, "", rank=self.r, scale=self.scale)
        return self._specs(positions, self.kind, rank=named.rank, scale=named.scale)


@dataclass(frozen=True, kw_only=True)
class PetConfig:
    """All that trains of a model.

    Attributes:
        mask: Entries of the dense weights; None for none.
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

    def structure(self, positions: Sequence[Position]) -> Structure:
        """The modules and their targets in a model of these positions.

        Raises:
            StructureError: A target that is not there, or two modules of one kind on one target.
        """
        if isinstance(self.modules, Structure):
            return self.modules
        return Structure(tuple(spec for module in self.modules for spec in module.specs(positions)))
