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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

import numpy as np
import torch
from torch import Tensor

from fedpet.config import MaskConfig
from fedpet.errors import ConfigError, StructureError

_STRETCH = 1 << 20  # entries looked at in one piece, whatever a tensor holds
# A sample of the scores is every 61st (a prime, since rows of weights are multiples of 64 long),
# or less often where that is more than `_SAMPLE`.
_EVERY = 61
_SAMPLE = 1 << 20
_SPARE = 32


@dataclass(frozen=True)
class MaskCounts:
    """Of each tensor, how many of its entries that a rule ranks first are trained: a mask in brief.

    A search finds the counts (fedpet/search/space.py); the positions are a function of them and of
    the pretrained weights, as those of one density are.

    Attributes:
        rule: As `mask.rule`.
        seed: As `mask.seed`, of the rule "random".
        entries: Parameter name -> number of entries, each above 0.
        sha256: Of the positions, in hex, see `Mask.digest`; "" is not compared.
    """

    rule: str = "smallest"
    seed: int = 0
    entries: Mapping[str, int] = field(default_factory=dict)
    sha256: str = ""

    def __post_init__(self) -> None:
        if not self.entries or any(
            not isinstance(count, int) or isinstance(count, bool) or count < 1
            for count in self.entries.values()
        ):
            raise StructureError(
                "the entries of a structure's mask must be counts of at least 1 by the name of a "
                f"weight, got {dict(self.entries)!r}. Leave out tensors without entries."
            )
        self.config()

    @property
    def num_values(self) -> int:
        """Count the trainable entries."""
        return sum(self.entries.values())

    def config(self) -> MaskConfig:
        """Return the settings of a mask that these counts cut; the density is not read."""
        return MaskConfig(rule=self.rule, seed=self.seed)

    def check(self, config: MaskConfig) -> None:
        """Refuse an experiment's `mask` that is not the one that was searched.

        Raises:
            ConfigError: Another rule or seed, tiers, or no mask at all.
        """
        if not config.enabled:
            raise ConfigError(
                f"the structure holds a mask of {self.num_values} entries, and mask.enabled is "
                "false. Set it to true, or take a structure without a mask."
            )
        if config.rule != self.rule or (self.rule == "random" and config.seed != self.seed):
            raise ConfigError(
                f"the structure's mask was searched with mask.rule = {self.rule!r} (seed "
                f"{self.seed}), got {config.rule!r} (seed {config.seed}). Set both alike."
            )
        if config.tiers:
            raise ConfigError(
                "mask.tiers are densities of one mask over all tensors, and the structure's mask "
                "has a count for each tensor. Remove mask.tiers, or take another structure."
            )


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


def build_mask(
    params: Mapping[str, Tensor], config: MaskConfig, counts: MaskCounts | None = None
) -> Mask:
    """Choose the entries that a rule ranks first.

    Args:
        params: Weights in scope by name, of any shapes, floating dtype. Left as they are.
        config: Rule, density and granularity.
        counts: Of each tensor, in the place of density and granularity.

    Returns:
        The mask. A lower density under the same rule is nested in it: with global granularity its
        entries are those of the lowest rank, in each tensor a prefix.

    Raises:
        ConfigError: The density leaves nothing to train, or a weight is not a number.
        StructureError: `counts` name another tensor, or more entries than it has.

    Example:
        >>> weights = {"w": torch.tensor([[3.0, -1.0], [0.5, 2.0]])}
        >>> build_mask(weights, MaskConfig(density=0.5)).positions
        {'w': tensor([2, 1])}
    """
    names = sorted(params)
    sizes = {name: params[name].numel() for name in names}
    if counts is not None:
        return _cut_by_counts(params, sizes, config, counts)
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


def _cut_by_counts(
    params: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    config: MaskConfig,
    counts: MaskCounts,
) -> Mask:
    """Take of each tensor as many of its first entries as it has counts."""
    counts.check(config)
    positions: dict[str, Tensor] = {}
    for name, count in sorted(counts.entries.items()):
        if count > sizes.get(name, 0):
            raise StructureError(
                f"the structure's mask takes {count} entries of {name!r}, of which this backbone "
                f"has {sizes.get(name, 0)} in scope: the structure was made for another one."
            )
        positions |= _ranked(params, [name], config, count)
    mask = Mask(positions, sizes)
    if counts.sha256 and mask.digest().hex() != counts.sha256:
        raise StructureError(
            f"the mask cut from this backbone is {mask.digest().hex():.16}, the structure's is "
            f"{counts.sha256:.16}: take the checkpoint that it was searched on."
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
        score = _scores_at(params[name], chosen, config, name)
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
        scores = [_scores_at(params[name], positions[name], config, name) for name in names]
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


def _ranked(
    params: Mapping[str, Tensor], names: Sequence[str], config: MaskConfig, num: int
) -> dict[str, Tensor]:
    """Choose the `num` entries of the lowest scores, lowest first, ties to the earlier.

    Weights are gone through a stretch at a time, three times: for a sample, for the score of rank
    `num`, for the entries. Beside the positions nothing is held but one tensor's own.
    """
    if not num:
        return {name: torch.empty(0, dtype=torch.int64) for name in names}
    threshold, ties = _threshold(params, names, config, num)
    ranked = {}
    for name in names:
        places, scores = [], []
        for first, score in _scores(params[name], config, name):
            here = torch.nonzero(score <= threshold).flatten()
            scores.append(score[here])
            places.append(here.add_(first))
        place, score = torch.cat(places), torch.cat(scores)
        tied = score == threshold
        if int(tied.count_nonzero()) > ties:
            inside = ~tied | (tied.cumsum(0) <= ties)
            place, score, tied = place[inside], score[inside], tied[inside]
        ties -= int(tied.count_nonzero())
        ranked[name] = place[torch.sort(score, stable=True).indices]
    return ranked


def _threshold(
    params: Mapping[str, Tensor], names: Sequence[str], config: MaskConfig, num: int
) -> tuple[float, int]:
    """Find the score of rank `num`, and how many of the `num` have that very score.

    A sample gives two scores with that rank between them; what lies between is few, and is sorted.
    """
    total = sum(params[name].numel() for name in names)
    every = _EVERY * math.ceil(total / (_EVERY * _SAMPLE))
    drawn = [s.clone() for name in names for _, s in _scores(params[name], config, name, every)]
    sample = torch.cat(drawn).sort().values
    spare = _SPARE + 4 * math.sqrt(num / every)
    while True:
        first, last = math.floor(num / every - spare), math.ceil(num / every + spare)
        low = float(sample[first]) if first >= 0 else -math.inf
        high = float(sample[last]) if last < len(sample) else math.inf
        below = at_low = at_high = 0
        between = []
        for name in names:
            for _, score in _scores(params[name], config, name):
                score = score[score <= high]
                below += int((score < low).count_nonzero())
                at_low += int((score == low).count_nonzero())
                at_high += int((score == high).count_nonzero()) if high > low else 0
                between.append(score[(score > low) & (score < high)])
        inside = torch.cat(between)
        rank = num - below
        if 0 < rank <= at_low + len(inside) + at_high:
            break
        spare *= 4  # the sample misled
    if rank <= at_low:
        return low, rank
    rank -= at_low
    if rank > len(inside):
        return high, rank - len(inside)
    threshold = float(inside.kthvalue(rank).values)
    return threshold, rank - int((inside < threshold).count_nonzero())


def _scores(
    weight: Tensor, config: MaskConfig, name: str, every: int = 1
) -> Iterator[tuple[int, Tensor]]:
    """Yield scores of one entry in `every` by the rule, lowest first, in float32, by stretches.

    Each comes with the place of its first entry, and lasts until the next: they share one buffer,
    since blocks of memory that come and go between small ones are not given back.
    """
    flat = weight.detach().reshape(-1)
    generator = None
    if config.rule == "random":
        from fedpet.utils.seeds import derive_seed

        generator = np.random.default_rng(derive_seed("mask", config.seed, name))
    step = every * math.ceil(_STRETCH / every)
    buffer = torch.empty(math.ceil(min(step, len(flat)) / every))
    for start in range(0, len(flat), step):
        part = flat[start : start + step]
        if generator is not None:
            yield start, torch.from_numpy(generator.random(len(part), dtype=np.float32))[::every]
        else:
            part = part[::every]
            yield start, _by_magnitude(part, config, name, buffer[: len(part)])


def _scores_at(weight: Tensor, chosen: Tensor, config: MaskConfig, name: str) -> Tensor:
    """Score the entries at the flat positions `chosen`, (k,)."""
    if config.rule == "random":
        return torch.cat([score for _, score in _scores(weight, config, name)])[chosen]
    entries = weight.detach().reshape(-1)[chosen.to(weight.device)]
    return _by_magnitude(entries, config, name, torch.empty(len(entries)))


def _by_magnitude(entries: Tensor, config: MaskConfig, name: str, out: Tensor) -> Tensor:
    magnitude = out.copy_(entries).abs_()
    if len(magnitude) and not math.isfinite(magnitude.max()):
        raise ConfigError(f"the weight {name!r} holds NaN or infinity: no mask can rank it.")
    return magnitude if config.rule == "smallest" else magnitude.neg_()
