"""Say where a mask is chosen by place and not by magnitude: its entries are tied.

Weights that were dequantised, or rounded to bfloat16, have few distinct magnitudes, and exact zeros
among them. The rule stands (ties go to the earlier entry, in the order of the names), so that all
devices agree; but a mask most of whose entries are tied is a mask of the first tensors by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import ROUND_CEILING, Context, Decimal

import torch
from torch import Tensor

from fedpet.config import MaskConfig
from fedpet.pet.mask import Mask

__all__ = ["describe_ties"]

MOST_TIED = 0.5  # of a mask's entries


def describe_ties(params: Mapping[str, Tensor], mask: Mask, config: MaskConfig) -> str:
    """Return a sentence where one magnitude fills more than half of a mask; else "".

    Args:
        params: Weights in scope by name, as the mask was built of them.
        mask: The mask.
        config: Its rule; "random" ranks no magnitudes, and nothing is said of it.

    Example:
        >>> weights = {"w": torch.tensor([0.0, 0.0, 0.0, 1.0])}
        >>> describe_ties(weights, Mask({"w": torch.tensor([0, 1])}, {"w": 4}), MaskConfig())[:50]
        '100 % of the 2 entries of the mask are exact zeros'
    """
    if config.rule == "random" or not mask.num_values:
        return ""
    chosen = [
        params[name].detach().reshape(-1)[positions.to(params[name].device)].float().abs().cpu()
        for name, positions in mask.positions.items()
    ]
    values, counts = torch.unique(torch.cat(chosen), return_counts=True)
    place = int(counts.argmax())
    share = int(counts[place]) / mask.num_values
    if share <= MOST_TIED:
        return ""
    value = float(values[place])
    tied = sum(_count(params[name], value) for name in mask.sizes)
    entries = sum(mask.sizes.values())
    what = "are exact zeros" if value == 0 else f"have the one magnitude {value:.3g}"
    return (
        f"{100 * share:.0f} % of the {mask.num_values:,} entries of the mask {what}, as "
        f"{tied:,} of the {entries:,} in scope are: their place in the checkpoint decides which "
        "of them are trained, and not their size. That is a sign of dequantised or coarsely "
        f"rounded weights; a density of {_density_of(2 * tied, entries):g} or more ranks half of "
        "the mask by size."
    )


def _count(weight: Tensor, value: float) -> int:
    return int((weight.detach().abs() == value).count_nonzero())


def _density_of(num: int, entries: int) -> float:
    """Return two digits of the density of so many entries, rounded up; at most 1."""
    context = Context(prec=2, rounding=ROUND_CEILING)
    return min(float(context.divide(Decimal(num), Decimal(entries))), 1.0)
