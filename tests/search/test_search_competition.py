"""Competition of gates: by gain per value, and steps that keep the gradients' ratios."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpet.search import expected_size, probabilities, solve_zeta
from fedpet.search.bilevel import SharedScale

Problem = tuple[torch.Tensor, torch.Tensor, float, float]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    count = draw(st.integers(2, 30))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    alpha = draw(st.floats(0.0, 5.0)) * torch.randn(count, generator=generator).double()
    sizes = torch.randint(1, 5000, (count,), generator=generator).double()
    budget = draw(st.floats(0.05, 0.95)) * float(sizes.sum())
    return alpha, sizes, budget, draw(st.sampled_from([0.3, 1.0]))


@given(problem=problems())
@settings(max_examples=60, deadline=None)
def test_through_zeta_the_expected_size_is_the_budget_and_stays_it_to_first_order(
    problem: Problem,
) -> None:
    alpha, sizes, budget, beta = problem
    leaf = alpha.clone().requires_grad_()
    p = probabilities(leaf, sizes, budget, beta, by_value=True)
    assert expected_size(alpha, sizes, solve_zeta(alpha, sizes, budget, beta), beta) == (
        pytest.approx(budget, rel=1e-9)
    )
    assert float(sizes @ p.detach()) == pytest.approx(budget, rel=1e-4)  # with the guards
    (slope,) = torch.autograd.grad(sizes @ p, leaf)
    assert float(slope.abs().max()) <= 1e-6 * float(sizes.sum())


def test_its_gradient_is_that_of_p_with_zeta_solved_anew() -> None:
    alpha = torch.tensor([0.4, -0.2, 0.9, 0.0]).double()
    sizes = torch.tensor([10.0, 50.0, 20.0, 40.0]).double()
    gains = torch.tensor([1.0, 3.0, -1.0, 0.5]).double()
    leaf = alpha.clone().requires_grad_()
    (gains @ probabilities(leaf, sizes, 60.0, 0.7, by_value=True)).backward()
    for index in range(4):
        sides = []
        for sign in (1, -1):
            moved = alpha.clone()
            moved[index] += sign * 1e-5
            sides.append(float(gains @ probabilities(moved, sizes, 60.0, 0.7)))
        assert float(leaf.grad[index]) == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-5)  # type: ignore[index]


def test_a_candidate_rises_where_it_gains_more_per_value_than_the_others() -> None:
    sizes = torch.tensor([100.0, 10.0, 50.0]).double()
    gains = torch.tensor([2.0, 1.0, 1.0]).double()  # 0.02, 0.1 and 0.02 a value
    leaf = torch.zeros(3).double().requires_grad_()
    (gains @ probabilities(leaf, sizes, 80.0, by_value=True)).backward()
    assert leaf.grad is not None
    assert [bool(slope > 0) for slope in leaf.grad] == [False, True, False]
    equals = torch.zeros(3).double().requires_grad_()
    (gains @ probabilities(equals, sizes, 80.0)).backward()
    assert equals.grad is not None
    assert bool(equals.grad[0] > 0)  # the paper's: the largest gain, whatever its size


def test_both_gradients_belong_to_the_same_probabilities() -> None:
    alpha = torch.linspace(-3, 3, 9).double()
    sizes = torch.arange(1.0, 10.0).double()
    one = probabilities(alpha, sizes, 20.0)
    torch.testing.assert_close(probabilities(alpha, sizes, 20.0, by_value=True), one)


def test_steps_by_one_scale_keep_the_ratios_of_the_gradients_and_cut_outliers() -> None:
    parameter = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimiser = SharedScale([parameter], lr=0.1)
    for _ in range(5):
        parameter.grad = torch.tensor([4.0, 2.0, -1.0]).double()
        optimiser.step()
    torch.testing.assert_close(-parameter.detach(), torch.tensor([1.0, 0.5, -0.25]).double())
    hated = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimiser = SharedScale([hated], lr=0.1)
    hated.grad = torch.tensor([1000.0, 2.0, -1.0]).double()
    optimiser.step()
    torch.testing.assert_close(-hated.detach(), torch.tensor([0.3, 0.1, -0.05]).double())


def test_gradients_of_zero_move_nothing() -> None:
    parameter = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimiser = SharedScale([parameter], lr=0.1)
    parameter.grad = torch.zeros(3).double()
    optimiser.step()
    assert not parameter.detach().any()


def test_a_search_of_one_scale_goes_on_from_its_state_with_the_same_bits() -> None:
    def steps(count: int, parameter: torch.Tensor, optimiser: SharedScale, first: int) -> None:
        for number in range(first, first + count):
            parameter.grad = torch.arange(3.0).double() - number
            optimiser.step()

    whole = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    steps(6, whole, SharedScale([whole], lr=0.1), 0)
    cut = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    before = SharedScale([cut], lr=0.1)
    steps(2, cut, before, 0)
    after = SharedScale([cut], lr=0.5)
    after.load_state_dict(before.state_dict())
    steps(4, cut, after, 2)
    assert torch.equal(whole, cut)
