"""Select the mask of a federation from the backbone: the entries smallest in magnitude (PaFi).

In:  the weights in scope, by name (`fedpet.backbone.module_roles.maskable_weights` says which
     those are).
Out: a `Mask`: for each name, the flat positions that clients may train, smallest magnitude first.

The mask is a function of the pretrained magnitudes alone. Server and clients compute the same one
from the same checkpoint, so positions need not travel: an upload is values only.

Source: Liao, Meng and Monz, ACL 2023, arXiv:2305.16742 (PaFi: the entries smallest in absolute
value are the trainable ones). Ours: over all tensors together unless asked otherwise; the number
of entries is rounded down; ties go to the earlier entry, in the order of the names, so that two
machines cannot disagree. `largest` and `random` are controls, not PaFi.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

import numpy as np
import torch
from torch import Tensor

from fedpet.config import MaskConfig
from fedpet.errors import ConfigError

# A sample bounds the scores that have to be sorted: every 61st entry (a prime, since rows of
# weights are multiples of 64 long), and somewhat more of them than asked for.
_EVERY = 61
_LOOK_AT = 1.1
_SPARE = 32


@dataclass(frozen=True)
class Mask:
    """Positions of the trainable entries, by tensor.

    Attributes:
        positions: Parameter name -> flat positions, int64, (k_name,), in the order of rank (for
            PaFi: smallest magnitude first). Names in alphabetical order, none without entries.
        sizes: Parameter name -> number of entries of that tensor, for every name in scope.
        tiers: For each of `mask.tiers`, weakest first: parameter name -> how many of its positions,
            counted from the first, are that tier's. Empty where no tiers are named.
    """

    positions: Mapping[str, Tensor]
    sizes: Mapping[str, int]
    tiers: tuple[Mapping[str, int], ...] = ()

    @property
    def num_values(self) -> int:
        """Count the trainable entries."""
        return sum(len(chosen) for chosen in self.positions.values())

    def digest(self) -> bytes:
        """Hash the set of positions by SHA-256, whatever their rank."""
        digest = hashlib.sha256()
        for name, chosen in self.positions.items():
            digest.update(f"{name}\0{len(chosen)}\0".encode())
            digest.update(np.sort(chosen.numpy()).astype("<i8").data)
        return digest.digest()


def build_mask(params: Mapping[str, Tensor], config: MaskConfig) -> Mask:
    """Choose the entries that a rule ranks first.

    Args:
        params: Weights in scope by name, of any shapes, floating dtype. Left as they are.
        config: Rule, density and granularity.

    Returns:
        The mask. A lower density under the same rule is nested in it: with global granularity its
        entries are those of the lowest rank, in each tensor a prefix.

    Raises:
        ConfigError: The density leaves nothing to train, or a weight is not a number.

    Example:
        >>> weights = {"w": torch.tensor([[3.0, -1.0], [0.5, 2.0]])}
        >>> build_mask(weights, MaskConfig(density=0.5)).positions
        {'w': tensor([2, 1])}
    """
    names = sorted(params)
    sizes = {name: params[name].numel() for name in names}
    if config.granularity == "per-tensor":
        ranked: dict[str, Tensor] = {}
        for name in names:
            ranked |= _ranked(params, [name], config, mask_size(config.density, sizes[name]))
    else:
        ranked = _ranked(params, names, config, mask_size(config.density, sum(sizes.values())))
    positions = {name: chosen for name, chosen in ranked.items() if len(chosen)}
    mask = Mask(positions, sizes, tier_counts(params, positions, config))
    if not mask.num_values:
        raise ConfigError(
            f"mask.density {config.density!r} leaves nothing to train: it is a fraction of the "
            f"{sum(sizes.values()):,} entries in scope, rounded down."
        )
    return mask


def pafi_mask(params: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
    """Choose the entries smallest in absolute value, over all tensors together.

    Args:
        params: Weights by name, of any shapes, floating dtype. Left as they are.
        density: Fraction of the N entries to train, in (0, 1]: 0.005 is half a percent.

    Returns:
        For each name with a chosen entry, its flat positions: int64, (k_name,), smallest magnitude
        first, so a lower density is a prefix. The k_name add up to floor(density * N).

    Raises:
        ConfigError: The density is out of its range or leaves nothing, or a weight is no number.

    Example:
        >>> pafi_mask({"w": torch.tensor([[3.0, -1.0], [0.5, 2.0]])}, density=0.5)
        {'w': tensor([2, 1])}
    """
    return dict(build_mask(params, MaskConfig(density=density)).positions)


def mask_size(density: float, num_entries: int) -> int:
    """Compute floor(density * num_entries), the density read as the decimal that was written."""
    return int(Decimal(repr(float(density))) * num_entries)  # numpy's floats show otherwise


def rank_positions(
    params: Mapping[str, Tensor], positions: Mapping[str, Tensor], config: MaskConfig
) -> dict[str, Tensor]:
    """Put positions, received as sets, into the order of rank that `build_mask` gives them."""
    ranked = {}
    for name, chosen in positions.items():
        chosen = chosen.sort().values
        score = _score(params[name], config, name)[chosen]
        ranked[name] = chosen[torch.sort(score, stable=True).indices]
    return ranked


def tier_counts(
    params: Mapping[str, Tensor], positions: Mapping[str, Tensor], config: MaskConfig
) -> tuple[dict[str, int], ...]:
    """Count the positions of each tensor that belong to the mask of each tier's density.

    Args:
        params: Weights in scope by name.
        positions: Of the whole mask, in the order of rank.
        config: Names the tiers.

    Returns:
        For each tier, weakest first: name -> count; () where no tiers are named.

    Raises:
        ConfigError: A tier holds nothing, or no more than the one below it.
    """
    if not config.tiers or not positions:
        return ()
    names = sorted(positions)
    if config.granularity == "per-tensor":
        tiers = [
            {name: mask_size(density, params[name].numel()) for name in names}
            for density in config.tier_densities
        ]
    else:
        scores = [_score(params[name], config, name)[positions[name]] for name in names]
        owner = torch.arange(len(names)).repeat_interleave(torch.tensor([*map(len, scores)]))
        owner = owner[torch.sort(torch.cat(scores), stable=True).indices]  # (k,) over all tensors
        total = sum(params[name].numel() for name in params)
        firsts = [owner[: mask_size(density, total)] for density in config.tier_densities]
        tiers = [
            dict(zip(names, torch.bincount(first, minlength=len(names)).tolist(), strict=True))
            for first in firsts
        ]
    check_tiers([sum(tier.values()) for tier in tiers], config)
    return tuple(tiers)


def check_tiers(counts: Sequence[int], config: MaskConfig) -> None:
    """Refuse tiers of which one trains no more entries than the one below it."""
    if any(more <= less for less, more in itertools.pairwise([0, *counts])):
        raise ConfigError(
            f"each of mask.tiers must train more entries than the one below it, got "
            f"{list(counts)} for {list(config.tiers)}: a density is rounded down to whole entries."
        )


def _score(weight: Tensor, config: MaskConfig, name: str, every: int = 1) -> Tensor:
    """Score one entry in `every` by the rule, lowest first, in float32."""
    if config.rule == "random":
        from fedpet.utils.seeds import derive_seed

        generator = np.random.default_rng(derive_seed("mask", config.seed, name))
        return torch.from_numpy(generator.random(weight.numel(), dtype=np.float32))[::every]
    magnitude = weight.detach().flatten()[::every].to("cpu", torch.float32).abs()
    if not bool(torch.isfinite(magnitude).all()):
        raise ConfigError(f"the weight {name!r} holds NaN or infinity: no mask can rank it.")
    return magnitude if config.rule == "smallest" else -magnitude


def _ranked(
    params: Mapping[str, Tensor], names: Sequence[str], config: MaskConfig, num: int
) -> dict[str, Tensor]:
    """Choose the `num` entries of the lowest scores, lowest first, ties to the earlier.

    The tensors are gone through one by one: only entries that may be among the lowest are kept, so
    that an edge device never holds the scores of all.
    """
    if not num:
        return {name: torch.empty(0, dtype=torch.int64) for name in names}
    looked_at = _LOOK_AT * num
    while True:
        bound = _bound(params, names, config, looked_at)
        places, scores = [], []
        for name in names:
            score = _score(params[name], config, name)
            places.append(torch.nonzero(score <= bound).flatten())
            scores.append(score[places[-1]])
        if sum(map(len, places)) >= num:
            break
        looked_at *= 2  # the sample misled
    order = torch.sort(torch.cat(scores), stable=True).indices[:num]
    owner = torch.arange(len(names)).repeat_interleave(torch.tensor([*map(len, places)]))[order]
    chosen = torch.cat(places)[order]
    return {name: chosen[owner == index] for index, name in enumerate(names)}


def _bound(
    params: Mapping[str, Tensor], names: Sequence[str], config: MaskConfig, wanted: float
) -> float:
    """Estimate a score that about `wanted` entries do not exceed, by a sample of them."""
    sample = torch.cat([_score(params[name], config, name, _EVERY) for name in names])
    rank = math.ceil(wanted / _EVERY) + _SPARE
    return math.inf if rank > len(sample) else float(torch.kthvalue(sample, rank).values)
