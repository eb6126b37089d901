"""Draw a structure at random under a budget: what a searched one must beat."""

from __future__ import annotations

from dataclasses import replace

from fedpet.pet.structure import Structure
from fedpet.search.space import Space
from fedpet.utils.seeds import derive_seed

__all__ = ["random_structure"]


def random_structure(space: Space, budget: float, *, seed: int, fingerprint: str = "") -> Structure:
    """Draw a structure of a space under a budget: what a searched one must beat.

    Raises:
        StructureError: The budget does not fit the space.

    Example:
        >>> from fedpet.search import SearchConfig, space_for
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> small = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        ...                    intermediate_size=64, vocab_size=50)
        >>> model = BertForSequenceClassification(small)
        >>> space = space_for(SearchConfig(), model)
        >>> drawn = random_structure(space, budget=300, seed=0)
        >>> drawn.provenance["values"] <= 300
        True
    """
    space.check_budget(budget)
    drawn = derive_seed("random structure", seed)
    chosen = space.select_at_random(budget, seed=drawn)
    return replace(
        space.structure(chosen),
        fingerprint=fingerprint,
        provenance={
            "method": "random",
            "seed": seed,
            "budget": budget,
            "values": space.chosen_size(chosen),
            "space": {"name": space.name, "values": space.num_values},
        },
    )
