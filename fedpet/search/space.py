"""List all that a search may choose, and the values each candidate sends: the space.

In:  a model, or its configuration alone (no weights: torch's meta device), and a space's name.
Out: a `Space`: candidates with exact sizes, in values.

    joint        the mask and the modules of `mergeable` under one budget. Of each weight in the
                 mask's scope the entries that its rule ranks first are cut into blocks, each a
                 candidate. What is chosen is how many blocks of a weight: the ones ranked first.
    mergeable    LoRA and HiWi on weights (frozen down-projections), BitFit on the biases there
                 are, HiWi on the biases of the feed-forward part, gains and biases of norms:
                 nothing adds latency. Key biases are left out, since the softmax cancels them.
    s3pet-mix    the paper's: LoRA factors and BitFit on the Linears of self-attention and
                 feed-forward part, gain and bias of every norm, low-rank adapters after both
                 sub-layers. BitFit adds a bias where there is none.
    s3pet-lora   the paper's: LoRA factors on those Linears only

Source: S3PET (Hu et al., NeurIPS 2022, arXiv:2206.07382), released code, for the two spaces of
the paper and LoRA's scale of 16 at rank 1. Ours: positions by role, so that any architecture has
the spaces (in T5-large they have 916 and 288 candidates, as in the paper's code); blocks of PaFi's
mask as candidates (Liao, Meng and Monz, ACL 2023, arXiv:2305.16742).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from fedpet.backbone.module_roles import Position, find_target_modules, maskable_weights
from fedpet.config import MaskConfig, SearchConfig
from fedpet.errors import ConfigError, StructureError
from fedpet.pet.mask import Mask, MaskCounts, build_mask
from fedpet.pet.model import PetModel
from fedpet.pet.modules.base import output_width
from fedpet.pet.modules.registry import KINDS
from fedpet.pet.structure import ModuleSpec, Structure, spec_of
from fedpet.search.select import chosen_size, select, select_at_random

if TYPE_CHECKING:
    from collections.abc import Collection

    from fedpet.backbone.pretrained import Backbone

__all__ = [
    "SPACES",
    "BlockSpec",
    "Candidate",
    "Space",
    "build_space",
    "model_of_space",
    "space_for",
    "space_of_structure",
]


@dataclass(frozen=True)
class BlockSpec:
    """One block of the ranked entries of a weight."""

    kind: ClassVar[str] = "mask"
    target: str  # path of the module
    weight: str  # name of the parameter
    block: int  # from 0: entries block * size to (block + 1) * size of the ranking


@dataclass(frozen=True)
class Candidate:
    """One module or block that may be chosen, and where it is."""

    spec: ModuleSpec | BlockSpec
    size: int  # values it sends
    tensor: str  # what it sends; candidates that name the same one are sent once
    position: Position


@dataclass(frozen=True)
class Space:
    """All candidates: blocks of the mask, then modules, each in the order of the model.

    The blocks of a weight are alike in size, and how many of them are chosen is what counts: the
    mask is then the entries ranked first, whichever blocks these are.
    """

    name: str
    candidates: tuple[Candidate, ...]
    mask_config: MaskConfig | None = None  # whose rule ranks the entries, where there are blocks

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
        specs = [self.candidates[index].spec for index in indices]
        entries: Counter[str] = Counter()
        for index in indices:
            candidate = self.candidates[index]
            if isinstance(candidate.spec, BlockSpec):
                entries[candidate.spec.weight] += candidate.size
        mask = None
        if entries:
            assert self.mask_config is not None
            mask = MaskCounts(self.mask_config.rule, self.mask_config.seed, dict(entries))
        return Structure(tuple(s for s in specs if isinstance(s, ModuleSpec)), mask=mask)

    @property
    def blocks(self) -> list[int]:
        """Sizes of the blocks of the mask, which are the first candidates."""
        return [c.size for c in self.candidates if isinstance(c.spec, BlockSpec)]

    def build_mask(self, params: Mapping[str, Tensor]) -> Mask | None:
        """Cut the mask that has every block; None where the space has none.

        Args:
            params: Weights in scope, see `maskable_weights`.
        """
        counts = self.structure().mask
        if counts is None or self.mask_config is None:
            return None
        return build_mask(params, self.mask_config, counts)

    def found(self, chosen: Sequence[int], params: Mapping[str, Tensor]) -> Structure:
        """Return the chosen candidates, with the hash of their mask's positions.

        Args:
            chosen: As `select` gives it.
            params: Weights in scope, see `maskable_weights`.
        """
        structure = self.structure(chosen)
        if structure.mask is None or self.mask_config is None:
            return structure
        digest = build_mask(params, self.mask_config, structure.mask).digest().hex()
        return replace(structure, mask=replace(structure.mask, sha256=digest))

    def select(self, scores: Sequence[float], budget: float) -> list[int]:
        """Choose candidates under a budget, likeliest first; of a weight its first blocks.

        Args:
            scores: Of each candidate; what rises with its probability.
            budget: In values, never exceeded (law 8).
        """
        return self._ranked_first(select(scores, self.sizes, budget, self.tensors))

    def select_at_random(self, budget: float, *, seed: int) -> list[int]:
        """Draw candidates under a budget, until no more fit; of a weight its first blocks."""
        drawn = select_at_random(self.sizes, budget, seed=seed, tensors=self.tensors)
        return self._ranked_first(drawn)

    def chosen_size(self, chosen: Sequence[int]) -> int:
        """Count the values that a choice sends, a shared tensor once."""
        return chosen_size(chosen, self.sizes, self.tensors)

    def gates_of(self, chosen: Sequence[int], p: Sequence[float]) -> tuple[float, ...]:
        """Return the probabilities of the chosen modules, in the order of `structure`."""
        specs = [self.candidates[index].spec for index in sorted(chosen)]
        pairs = zip(specs, (p[index] for index in sorted(chosen)), strict=True)
        return tuple(gate for spec, gate in pairs if isinstance(spec, ModuleSpec))

    def _ranked_first(self, chosen: Sequence[int]) -> list[int]:
        """Put the first blocks of each weight in the place of as many of its blocks."""
        taken: Counter[str] = Counter()
        first = {
            c.spec.weight: index
            for index, c in reversed(list(enumerate(self.candidates)))
            if isinstance(c.spec, BlockSpec)
        }
        places = []
        for index in chosen:
            spec = self.candidates[index].spec
            if isinstance(spec, BlockSpec):
                index = first[spec.weight] + taken[spec.weight]
                taken[spec.weight] += 1
            places.append(index)
        return places

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
SPACES = ("joint", "mergeable", "s3pet-mix", "s3pet-lora")
_MODULES_OF = {"joint": "mergeable"}


def build_space(
    model: nn.Module,
    name: str = "mergeable",
    *,
    head: Collection[str] = (),
    kinds: Collection[str] = (),
    rank: int = 1,
    scale: float = 16.0,
    mask: MaskConfig | None = None,
    block: int = 256,
    blocks: int = 4,
) -> Space:
    """Find every candidate of a space in a model, which may lie on the meta device.

    Args:
        model: Any transformer; its weights are not read.
        name: Of `SPACES`.
        head: Names of newly initialised parameters, which carry no candidates.
        kinds: Of the candidates; none takes all kinds of the space.
        rank: Of LoRA, HiWi and the adapter's factors.
        scale: Of LoRA; HiWi and the adapter have scale 1.
        mask: Whose rule ranks the entries, of `joint`; None is the default rule.
        block: Entries of a block, of `joint`; fewer where a weight has not as many.
        blocks: Of a weight.

    Raises:
        ConfigError: An unknown space, or a rank below 1.
        StructureError: The model has no candidate of this space, or none of these kinds.

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
    if name == "joint":
        mask = mask or MaskConfig()
        candidates += _blocks(model, head, block, blocks)
    else:
        mask = None
    rules = _rules(_MODULES_OF.get(name, name))
    for position in find_target_modules(model, head):
        for kind, wanted in rules:
            if wanted(position):
                spec = spec_of(kind, position.name, rank=rank, scale=scale)
                candidates.append(_candidate(spec, position, model))
    candidates = [c for c in candidates if not kinds or c.spec.kind in kinds]
    if not candidates:
        of_kinds = f" of {', '.join(sorted(kinds))}" if kinds else ""
        raise StructureError(f"the space {name!r} has no candidate{of_kinds} in this model.")
    return Space(name, tuple(candidates), mask)


def space_for(
    config: SearchConfig,
    model: nn.Module,
    mask: MaskConfig | None = None,
    *,
    head: Collection[str] = (),
) -> Space:
    """Build the space that a search's settings name, see `build_space`.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> small = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        ...                    intermediate_size=64, vocab_size=50)
        >>> model = BertForSequenceClassification(small)
        >>> {one.spec.kind for one in space_for(SearchConfig(space="s3pet-lora"), model).candidates}
        {'lora-factors'}
    """
    return build_space(
        model,
        config.space,
        head=head,
        kinds=config.kinds,
        rank=config.rank,
        scale=config.scale,
        mask=mask,
        block=config.mask_block,
        blocks=config.mask_blocks,
    )


def model_of_space(
    backbone: Backbone, space: Space, mask: Mask | None, *, seed: int, products: str = "torch"
) -> PetModel:
    """Put all candidates of a space on a backbone, in place, each with a gate of its own.

    Args:
        mask: The space's own (`Space.build_mask`); of a space without blocks one that is trained
            beside the candidates, ungated.
    """
    modules = Structure(space.structure().modules)
    pet = PetModel(backbone, mask, modules, seed=seed, products=products)
    if space.blocks:
        pet.gate_mask(space.blocks)
    return pet


def _blocks(model: nn.Module, head: Collection[str], block: int, blocks: int) -> list[Candidate]:
    """Cut the first entries of each weight in the mask's scope into blocks, weight by weight."""
    places = {f"{p.name}.weight": p for p in find_target_modules(model, head) if p.in_features}
    found = []
    for name, weight in maskable_weights(model, head).items():
        size = min(block, weight.numel() // blocks)
        position = places[name]
        for number in range(blocks if size else 0):
            spec = BlockSpec(position.name, name, number)
            found.append(Candidate(spec, size, f"{name}:{number}", position))
    return found


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
