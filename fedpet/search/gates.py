"""Compute probabilities that meet a budget in expectation, and draw soft gates from them.

In:  one structural parameter alpha a candidate, the candidates' sizes, a budget, a temperature.
Out: probabilities p with the paper's gradient, and relaxed 0/1 gates z drawn from them.

    p_i = sigmoid((alpha_i - zeta) / beta),  zeta such that  sum_i n_i p_i = budget

zeta is a constant to the gradient; a detached renormalisation, of value 1, lets the candidates
compete: dp_i/dalpha_k = delta_ik s_i - p_i s_k / sum(p), with s = p (1 - p) / beta.

Candidates so compete as equals, whatever their sizes. `by_value` differentiates through zeta in
the place of that: the expected size then holds to first order, and a candidate rises where it gains
more per value than others do: dp_i/dalpha_k = delta_ik s_i - s_i n_k s_k / sum(n s).

Source: S3PET (Hu et al., NeurIPS 2022, arXiv:2206.07382) and its released code; binary concrete is
that of Maddison et al., ICLR 2017, arXiv:1611.00712. Ours: bisection computes zeta inside a bracket
that always has the root, where the release starts a quasi-Newton solver at the last zeta and
ignores its failures; and it solves for the budget itself, not for a ten-millionth less.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedpet.errors import StructureError

__all__ = ["concrete", "expected_size", "probabilities", "solve_zeta", "uniform"]

NUDGE = 1e-7  # a probability of exactly 0 or 1 has no logit, and moves this far inward
LOWEST_ARGUMENT = -200.0  # of the sigmoid; e^-200 is still far above the smallest float64
_BISECTIONS = 200  # more than halve any float64 interval to nothing


def solve_zeta(alpha: Tensor, sizes: Tensor, budget: float, beta: float = 1.0) -> float:
    """Find the shift at which the expected size is the budget.

    Args:
        alpha: Structural parameters, float64, shape (n,).
        sizes: Values of each candidate, float64, shape (n,), positive.
        budget: In values, between 0 and the sum of the sizes, both excluded.
        beta: Temperature, above 0.

    Returns:
        zeta. It needs no start: the expected size falls strictly in zeta, and
        [min alpha + c, max alpha + c] holds the root, with c = beta log((sum - budget) / budget).

    Raises:
        StructureError: No zeta gives this budget.

    Example:
        >>> alpha, sizes = torch.zeros(3).double(), torch.tensor([10.0, 20.0, 70.0])
        >>> zeta = solve_zeta(alpha, sizes, budget=25)
        >>> round(expected_size(alpha, sizes, zeta), 9)
        25.0
    """
    total = float(sizes.sum())
    if not 0 < budget < total:
        raise StructureError(
            f"a search's budget must lie between 0 and the {total:.0f} values of its space, both "
            f"excluded, got {budget:g}. With the whole space there is nothing to choose."
        )
    alpha = alpha.detach().double()
    c = beta * math.log((total - budget) / budget)
    low, high = float(alpha.min()) + c, float(alpha.max()) + c
    for _ in range(_BISECTIONS):
        middle = low + (high - low) / 2
        if not low < middle < high:
            break
        if expected_size(alpha, sizes, middle, beta) > budget:
            low = middle
        else:
            high = middle
    left, right = (abs(expected_size(alpha, sizes, z, beta) - budget) for z in (low, high))
    return low if left <= right else high


def expected_size(alpha: Tensor, sizes: Tensor, zeta: float, beta: float = 1.0) -> float:
    """Return the values that the gates let through on average, in float64, before any guard.

    Example:
        >>> expected_size(torch.zeros(2), torch.tensor([10.0, 30.0]), zeta=0.0)
        20.0
    """
    return float((sizes.double() * torch.sigmoid((alpha.detach().double() - zeta) / beta)).sum())


def probabilities(
    alpha: Tensor,
    sizes: Tensor,
    budget: float,
    beta: float = 1.0,
    *,
    zeta: float | None = None,
    by_value: bool = False,
) -> Tensor:
    """Return how likely each candidate is chosen, under the budget.

    Args:
        alpha: Structural parameters, float64, shape (n,); the gradient goes here.
        sizes: Values of each candidate, shape (n,).
        budget: In values.
        beta: Temperature; towards 0, probabilities go to 0 and 1.
        zeta: Where it is known; None solves for it.
        by_value: Differentiate through zeta, ours; else the paper's gradient. The same numbers, but
            for the guards.

    Returns:
        p, float64, shape (n,), inside (0, 1). Its values do not change when a constant is added
        to alpha; its order is alpha's.

    Example:
        >>> alpha = torch.tensor([1.0, 0.0, -1.0]).double()
        >>> sizes = torch.tensor([10.0, 10.0, 10.0]).double()
        >>> p = probabilities(alpha, sizes, budget=15)
        >>> [round(value, 3) for value in p.tolist()], round(float(sizes @ p), 6)
        ([0.731, 0.5, 0.269], 15.0)
    """
    if zeta is None:
        zeta = solve_zeta(alpha, sizes, budget, beta)
    if by_value:
        return _through_zeta(alpha.double(), sizes.to(alpha.device).double(), zeta, beta)
    p = torch.sigmoid(((alpha.double() - zeta) / beta).clamp(min=LOWEST_ARGUMENT))
    p = torch.where(p >= 1, p - NUDGE, p)
    p = torch.where(p <= 0, p + NUDGE, p)
    total = p.sum()
    return p * (total.detach() / total)


def _through_zeta(alpha: Tensor, sizes: Tensor, zeta: float, beta: float) -> Tensor:
    """Compute p, zeta being a function of alpha that keeps the expected size."""
    fixed = alpha.detach()
    p = torch.sigmoid((fixed - zeta) / beta)
    weight = sizes * p * (1 - p)  # n_k s_k, but for a factor
    weight = weight / weight.sum().clamp(min=1e-300)
    here = zeta + (weight * (alpha - fixed)).sum()  # of value zeta
    p = torch.sigmoid(((alpha - here) / beta).clamp(min=LOWEST_ARGUMENT))
    return p.clamp(NUDGE, 1 - NUDGE)


def uniform(count: int, seed: int) -> Tensor:
    """Draw seeded noise inside (0, 1): float64, shape (count,).

    Example:
        >>> torch.equal(uniform(4, seed=1), uniform(4, seed=1)), len(uniform(4, seed=1))
        (True, 4)
    """
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(count, generator=generator, dtype=torch.float64)
    return u.clamp(min=2.0**-53)


def concrete(
    p: Tensor, u: Tensor, *, hard: bool = False, right: float = 1.0, left: float = 0.0
) -> Tensor:
    """Draw relaxed gates: binary concrete at temperature 1, P(z >= 0.5) = p.

    Args:
        p: Probabilities inside (0, 1), shape (n,); the gradient goes here.
        u: Uniform noise inside (0, 1), shape (n,). At u = 1/2 the gate is p.
        hard: Gates of 0 and 1: an open one has the soft one's gradient, a closed one none. If all
            are closed, the likeliest is opened.
        right: Upper end of the stretch before clipping to [0, 1]; 1 does not stretch.
        left: Lower end; 0 does not stretch.

    Returns:
        z in [0, 1], shape (n,).

    Example:
        >>> p, half = torch.tensor([0.9, 0.2]), torch.tensor([0.5, 0.5])
        >>> [round(z, 3) for z in concrete(p, half).tolist()]
        [0.9, 0.2]
        >>> concrete(p, half, hard=True).tolist()
        [1.0, 0.0]
    """
    soft = torch.sigmoid(torch.logit(u.to(p)) + torch.logit(p))
    soft = soft * (right - left) + left
    clipped = soft.clamp(0.0, 1.0)
    if not hard:
        return clipped
    on = soft.detach() >= (right + left) / 2
    if not bool(on.any()):
        on = torch.zeros_like(on)
        on[int(p.detach().argmax())] = True
    return torch.where(on, 1.0 + (clipped - clipped.detach()), torch.zeros_like(clipped))
