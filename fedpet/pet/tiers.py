"""Give devices of different strength prefixes of the one ranked mask to train: tiers.

In:  `mask.tiers`, such as "0.001=0.3", "0.005=0.5", "0.02=0.2": the densities, and which share of
     the clients trains each; the layouts of a `PetModel` that was built with them.
Out: which tier a client is of, and where a tier's values lie among those of the whole mask.

The mask is ranked, so the mask of a lower density is the front of each tensor's ranking: nothing
more has to be agreed on than how long each front is, and that both sides compute. A device of a
tier receives, trains and sends the tier's values alone; the rest of the mask it leaves at the
checkpoint. Other modules and the head are trained by all.

A client's tier is drawn from its name, so that it is the same in every round and after a restart. A
node that knows better names the most that it trains (`max-density` in its own configuration), and
tells the server when it is asked for another tier.

Source: ours; that weak devices train a nested part of the model is HeteroFL's and FjORD's idea
(arXiv:2010.01264, arXiv:2102.13451), there with slices of dense layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fedpet.config import MaskConfig
from fedpet.errors import PlanError, StructureError
from fedpet.pet.layout import Communicated, Segment, head_groups, quantisation_groups
from fedpet.utils.seeds import derive_seed

__all__ = ["Tier", "Where", "draw_tier", "largest_tier", "tier_positions", "tiers_of"]

Where = np.ndarray | slice  # an index into the values of the whole layout


@dataclass(frozen=True)
class Tier:
    """The values that the devices of one strength train and send.

    Attributes:
        density: Of its part of the mask; 0 where no weight is masked.
        share: Fraction of the clients that are drawn into it.
        where: Which of the last tier's values are its own: int64, (count,), ascending; a slice of
            all for the last tier itself.
        count: How many these are.
        groups: Runs of its values that are of one kind, see
        `fedpet.pet.layout.quantisation_groups`.
        head_groups: Those of them that are the head's.
    """

    density: float
    share: float
    where: Where
    count: int
    groups: list[tuple[int, int]]
    head_groups: list[tuple[int, int]] = field(default_factory=list)


def tiers_of(pet: Communicated, config: MaskConfig | None) -> tuple[Tier, ...]:
    """List the tiers of a model, weakest first; the last has all values.

    Args:
        pet: Built with the mask of `config`.
        config: None where no weight is masked.
    """
    shares = ((0.0, 1.0),) if config is None else config.tier_shares
    whole = pet.tiers[-1]
    return tuple(
        Tier(
            density,
            share,
            slice(None) if layout is whole else tier_positions(whole, layout),
            sum(segment.size for segment in layout),
            quantisation_groups(layout),
            head_groups(layout),
        )
        for (density, share), layout in zip(shares, pet.tiers, strict=True)
    )


def draw_tier(config: MaskConfig | None, client: int) -> int:
    """Draw the tier of a client whose node names none: index into the tiers, weakest first.

    Args:
        config: None where no weight is masked.
        client: Its number, see `fedpet.utils.seeds.client_id64`. Shares are met in the mean over
            clients, not exactly: a client's tier does not depend on who else there is.
    """
    if config is None or not config.tiers:
        return 0
    left = derive_seed("tier", config.seed, client) / 2**63  # in [0, 1)
    last = 0
    for tier, (_, share) in enumerate(config.tier_shares):
        if share:
            last = tier
        left -= share
        if left < 0:
            return tier
    return last  # the shares add up to 1 but for rounding


def largest_tier(config: MaskConfig | None, max_density: float) -> int:
    """Find the largest tier that a node can train.

    Args:
        config: None where no weight is masked.
        max_density: What the node can train, as a fraction of the entries in scope.

    Raises:
        PlanError: Every tier is larger.
    """
    if config is None:
        return 0
    within = [tier for tier, density in enumerate(config.tier_densities) if density <= max_density]
    if not within:
        raise PlanError(
            f"this node trains a density of at most {max_density!r} (max-density), the plan's "
            f"least is {config.tier_densities[0]!r}: name a tier for it in mask.tiers."
        )
    return within[-1]


def tier_positions(whole: Sequence[Segment], tier: Sequence[Segment]) -> np.ndarray:
    """Find the values of a tier, a mask of lower density, among those of the whole mask.

    Each weight's entries are in the order of their rank, so a tier's are a prefix of them; the
    other segments are the same. `values[tier_positions(whole, tier)]` are the tier's values.

    Returns:
        int64, (number of the tier's values,).

    Raises:
        StructureError: The tier is not nested in the whole layout.
    """
    by_name = {(segment.kind, segment.name): segment for segment in whole}
    pieces = [np.empty(0, dtype=np.int64)]
    for segment in tier:
        full = by_name.get((segment.kind, segment.name))
        if full is None or segment.size > full.size:
            raise StructureError(
                f"a tier must be nested in the full layout, and its {segment.kind!r} segment "
                f"{segment.name!r} of {segment.size} values is not. Take the same backbone, rule "
                "and structure, and a lower density."
            )
        if segment.kind != "mask" and segment.size != full.size:
            raise StructureError(
                f"a tier differs in its mask alone, and its {segment.kind!r} segment "
                f"{segment.name!r} has {segment.size} values instead of {full.size}. Take the "
                "same structure."
            )
        pieces.append(np.arange(full.start, full.start + segment.size, dtype=np.int64))
    return np.concatenate(pieces)
