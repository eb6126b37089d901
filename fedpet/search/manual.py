"""Put presets that a person would write down under a budget: what a searched one must beat.

In:  presets joined by "+" (fedpet/pet/structure.py), a budget in values.
Out: a `Structure` inside the budget.

Where the presets as a whole fit, they are taken as a whole, ranked modules with the highest rank
that fits. Where they do not fit even with the lowest rank, layers are filled from the top down, as
is usual where only a part of a model is tuned: the whole list is walked from the output to the
input, and what does not fit any more is skipped.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from torch import nn

from fedpet.backbone.module_roles import find_target_modules
from fedpet.errors import StructureError
from fedpet.pet.structure import Structure, preset
from fedpet.search.select import chosen_size, select
from fedpet.search.space import Space, space_of_structure

__all__ = ["manual_structure"]


def manual_structure(
    model: nn.Module,
    names: str,
    budget: float,
    *,
    head: Collection[str] = (),
    rank: int = 1,
    scale: float = 16.0,
    fingerprint: str = "",
) -> Structure:
    """Put presets under a budget.

    Args:
        model: Its weights are not read.
        names: Presets joined by "+".
        budget: In values; law 8: the structure never exceeds it.
        head: Names of newly initialised parameters.
        rank: The lowest of LoRA, HiWi and the adapter's factors.
        scale: Of LoRA at that rank; rank times scale stays what it is.
        fingerprint: Of the backbone.

    Raises:
        StructureError: An unknown preset, or a budget below its smallest module.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> small = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        ...                    intermediate_size=64, vocab_size=50)
        >>> model = BertForSequenceClassification(small)
        >>> found = manual_structure(model, "lora", budget=1000)
        >>> found.provenance["rank"], found.provenance["values"]
        (7, 896)
    """
    positions = find_target_modules(model, head)

    def at_rank(r: int) -> Space:
        whole = preset(names, positions, rank=r, scale=scale * rank / r)
        return space_of_structure(model, whole, names, head=head)

    def size(space: Space) -> int:
        return chosen_size(range(len(space.candidates)), space.sizes, space.tensors)

    taken, space = rank, at_rank(rank)
    if not space.candidates:
        raise StructureError(f"a manual structure needs a preset to take, got {names!r}.")
    if size(space) <= budget:
        chosen = list(range(len(space.candidates)))
        while size(space) < size(larger := at_rank(taken + 1)) <= budget:
            taken, space = taken + 1, larger
    else:
        if budget < min(space.sizes):
            raise StructureError(
                f"the budget must hold at least one module of {names!r}, "
                f"{min(space.sizes)} values, got {budget:g}. Raise it."
            )
        depth = {position.name: index for index, position in enumerate(positions)}
        heights = [float(depth[c.spec.target]) for c in space.candidates]
        chosen = select(heights, space.sizes, budget, space.tensors)
    return replace(
        space.structure(chosen),
        fingerprint=fingerprint,
        provenance={
            "method": "manual",
            "presets": names,
            "rank": taken,
            "whole": len(chosen) == len(space.candidates),
            "budget": int(budget),
            "values": chosen_size(chosen, space.sizes, space.tensors),
        },
    )
