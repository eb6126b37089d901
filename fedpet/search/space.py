"""List every small module that a search may choose, and the values each one sends: the space.

In:  a model, or its configuration alone (no weights: torch's meta device), and a space's name.
Out: a `Space`: candidates with exact sizes, in values.

    mergeable    LoRA and HiWi on weights (frozen down-projections), BitFit on the biases there
                 are, HiWi on the biases of the feed-forward part, gains and biases of norms:
                 nothing adds latency. Key biases are left out, since the softmax cancels them.
    s3pet-mix    the paper's: LoRA factors and BitFit on the Linears of self-attention and
                 feed-forward part, gain and bias of every norm, low-rank adapters after both
                 sub-layers. BitFit adds a bias where there is none.
    s3pet-lora   the paper's: LoRA factors on those Linears only

Source: S3PET (Hu et al., NeurIPS 2022, arXiv:2206.07382), released code, for the two spaces of
the paper and LoRA's scale of 16 at rank 1. Ours: positions by role, so that any architecture has
the spaces; in T5-large they have 916 and 288 candidates, as in the paper's code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from fedpet.backbone.module_roles import Position, find_target_modules
from fedpet.errors import ConfigError, StructureError
from fedpet.pet.modules.base import output_width
from fedpet.pet.modules.registry import KINDS
from fedpet.pet.structure import ModuleSpec, Structure, spec_of

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = [
    "SPACES",
    "Candidate",
    "Space",
    "build_space",
    "space_of_structure",
]


@dataclass(frozen=True)
class Candidate:
    """One module that may be chosen, and where it is."""

    spec: ModuleSpec
    size: int  # values it sends
    tensor: str  # what it sends; candidates that name the same one are sent once
    position: Position


@dataclass(frozen=True)
class Space:
    """All candidates, in the order of the model's modules."""

    name: str
    candidates: tuple[Candidate, ...]

    @property
    def sizes(self) -> list[int]:
        return [candidate.size for candidate in self.candidates]

    @property
    def tensors(self) -> list[str]:
        return [candidate.tensor for candidate in self.candidates]

    @property
    def num_values(self) -> int:
        """Sum all sizes, as the expected size does."""
        return sum(self.sizes)

    def structure(self, chosen: Sequence[int] | None = None) -> Structure:
        """Return the chosen candidates in the space's order; None takes all."""
        indices = range(len(self.candidates)) if chosen is None else sorted(chosen)
        return Structure(tuple(self.candidates[index].spec for index in indices))

    def check_budget(self, budget: float) -> None:
        """Refuse a budget that leaves nothing to search.

        Raises:
            StructureError: It holds no candidate, or all of them.
        """
        smallest = min(self.candidates, key=lambda candidate: candidate.size)
        if not budget >= smallest.size:
            raise StructureError(
                f"the budget must hold at least the smallest candidate of {self.name!r}, "
                f"{smallest.size} values ({smallest.spec.kind} on {smallest.spec.target!r}), got "
                f"{budget:g}. Raise it, or lower the rank."
            )
        if not budget < self.num_values:
            raise StructureError(
                f"the budget must be below the {self.num_values} values of the whole space "
                f"{self.name!r}, got {budget:g}: there is nothing to choose. Lower it, or take "
                "a preset that names these modules."
            )


# The kinds of each stand at their classes: `spaces` of `register_module`.
SPACES = ("mergeable", "s3pet-mix", "s3pet-lora")


def build_space(
    model: nn.Module,
    name: str = "mergeable",
    *,
    head: Collection[str] = (),
    rank: int = 1,
    scale: float = 16.0,
) -> Space:
    """Find every candidate of a space in a model, which may lie on the meta device.

    Args:
        model: Any transformer; its weights are not read.
        name: Of `SPACES`.
        head: Names of newly initialised parameters, which carry no candidates.
        rank: Of LoRA, HiWi and the adapter's factors.
        scale: Of LoRA; HiWi and the adapter have scale 1.

    Raises:
        ConfigError: An unknown space, or a rank below 1.
        StructureError: The model has no candidate of this space.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> small = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        ...                    intermediate_size=64, vocab_size=50)
        >>> model = BertForSequenceClassification(small)
        >>> space = build_space(model, "mergeable")
        >>> len(space.candidates), space.candidates[0].spec.kind, space.candidates[0].size
        (40, 'lora', 32)
    """
    if name not in SPACES:
        raise ConfigError(f"a search space must be one of {', '.join(SPACES)}, got {name!r}.")
    if rank < 1:
        raise ConfigError(f"the rank of a search's candidates must be at least 1, got {rank}.")
    candidates = []
    rules = _rules(name)
    for position in find_target_modules(model, head):
        for kind, wanted in rules:
            if wanted(position):
                spec = spec_of(kind, position.name, rank=rank, scale=scale)
                candidates.append(_candidate(spec, position, model))
    if not candidates:
        raise StructureError(f"the space {name!r} has no candidate in this model.")
    return Space(name, tuple(candidates))


def space_of_structure(
    model: nn.Module, structure: Structure, name: str, *, head: Collection[str] = ()
) -> Space:
    """Take the modules of a structure as candidates: what each of them sends, and where it is.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> small = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        ...                    intermediate_size=64, vocab_size=50)
        >>> model = BertForSequenceClassification(small)
        >>> structure = preset_structure(model, "lnfit")
        >>> space_of_structure(model, structure, "norms").num_values
        128
    """
    places = {(p.name, p.kind == "block"): p for p in find_target_modules(model, head)}
    candidates = []
    for spec in structure.modules:
        position = places[spec.target, "block" in KINDS[spec.kind].targets]
        candidates.append(_candidate(spec, position, model))
    return Space(name, tuple(candidates))


def _candidate(spec: ModuleSpec, position: Position, model: nn.Module) -> Candidate:
    size = _size(spec, position, model.get_submodule(position.name))
    return Candidate(spec, size, _tensor(spec), position)


def _size(spec: ModuleSpec, position: Position, module: nn.Module) -> int:
    """Count the values that a module sends."""
    d_in, d_out = position.in_features, position.out_features
    if position.kind == "block":
        d_in = d_out = output_width(module)
    return KINDS[spec.kind].size(d_in, d_out, spec.rank)


def _tensor(spec: ModuleSpec) -> str:
    shared = KINDS[spec.kind].tensor
    return f"{spec.target}.{shared}" if shared else f"{spec.target}:{spec.kind}"


def _rules(space: str) -> list[tuple[str, Callable[[Position], bool]]]:
    """List the kinds of a space, and the positions of each, in the order of candidates."""
    kinds = sorted(KINDS.items(), key=lambda entry: entry[1].order)  # stable
    return [(kind, facts.spaces[space]) for kind, facts in kinds if space in facts.spaces]
