"""Bi-level steps: the hypergradient against autograd's own, and what a step leaves as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fedpet.search import hypergradient, virtual_step

RATE = 0.05
Loss = Callable[[list[Tensor], Tensor], Tensor]


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quadratic() -> tuple[list[Tensor], Tensor, Loss, Loss]:
    """Third order in both together, so that second derivatives are not constant."""
    a, b, c = randn(4, 3, seed=1), randn(4, 4, seed=2), randn(4, seed=3)

    def inner(theta: list[Tensor], gates: Tensor) -> Tensor:
        return (theta[0] * (a @ gates)).sum() + (theta[0] @ b.abs() @ theta[0]) * gates.sum() / 4

    def outer(theta: list[Tensor], gates: Tensor) -> Tensor:
        return ((theta[0] - c) ** 2).sum() + (theta[0] * (a @ gates**2)).sum()

    return [randn(4, seed=4)], randn(3, seed=5), inner, outer


def network() -> tuple[list[Tensor], Tensor, Loss, Loss]:
    """Two layers, a gate on each hidden unit."""
    theta = [randn(5, 6, seed=1), randn(6, 2, seed=2)]

    def loss(seed: int) -> Loss:
        x, y = randn(8, 5, seed=seed), randn(8, seed=seed + 1) > 0
        return lambda theta, gates: nn.functional.cross_entropy(
            (torch.tanh(x @ theta[0]) * torch.sigmoid(gates)) @ theta[1], y.long()
        )

    return theta, randn(6, seed=3), loss(10), loss(20)


def exact(
    theta: list[Tensor], gates: Tensor, inner: Loss, outer: Loss, step: Callable[[Tensor], Tensor]
) -> Tensor:
    """Autograd through the virtual step itself."""
    leaves = [t.clone().requires_grad_() for t in theta]
    gates = gates.clone().requires_grad_()
    gradients = torch.autograd.grad(inner(leaves, gates), leaves, create_graph=True)
    moved = [t - step(g) for t, g in zip(leaves, gradients, strict=True)]
    return torch.autograd.grad(outer(moved, gates), gates)[0]


def ours(
    theta: list[Tensor], gates: Tensor, inner: Loss, outer: Loss, rule: str
) -> tuple[Tensor, list[Tensor]]:
    parameters = [nn.Parameter(t.clone()) for t in theta]
    optimiser = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, eps=1e-2)
    tensors: list[Tensor] = list(parameters)
    gradient, _, _ = hypergradient(
        gates, optimiser, lambda z: inner(tensors, z), lambda z: outer(tensors, z), rule=rule
    )
    return gradient, [parameter.detach() for parameter in parameters]


def cold_adam(gradient: Tensor) -> Tensor:
    return RATE * gradient / (gradient.abs() + 1e-2)


@pytest.mark.parametrize("problem", [quadratic, network])
def test_the_hypergradient_of_an_sgd_step_is_autograd_s(
    problem: Callable[[], tuple[list[Tensor], Tensor, Loss, Loss]],
) -> None:
    theta, gates, inner, outer = problem()
    wanted = exact(theta, gates, inner, outer, lambda g: RATE * g)
    first_order = exact(theta, gates, inner, outer, lambda g: RATE * g.detach())
    found, after = ours(theta, gates, inner, outer, "sgd")
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found, first_order, rtol=1e-2)  # the second order counts here
    assert all(torch.equal(a, t) for a, t in zip(after, theta, strict=True))


@pytest.mark.parametrize("problem", [quadratic, network])
def test_the_hypergradient_of_an_adamw_step_is_autograd_s_with_its_own_jacobian(
    problem: Callable[[], tuple[list[Tensor], Tensor, Loss, Loss]],
) -> None:
    theta, gates, inner, outer = problem()
    wanted = exact(theta, gates, inner, outer, cold_adam)
    found, _ = ours(theta, gates, inner, outer, "adamw-exact")
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-5)
    faithful, _ = ours(theta, gates, inner, outer, "adamw")
    assert not torch.allclose(faithful, wanted, rtol=1e-2)  # the paper's correction is another


@pytest.mark.parametrize("steps", [0, 3])
def test_a_virtual_adamw_step_is_the_real_one_and_leaves_its_state_alone(steps: int) -> None:
    parameters = [nn.Parameter(randn(5, seed=1)), nn.Parameter(randn(2, 3, seed=2))]
    optimiser = torch.optim.AdamW(
        [{"params": parameters[:1], "lr": 0.1}, {"params": parameters[1:], "lr": 0.02}],
        weight_decay=0.1,
    )
    for step in range(steps + 1):
        for index, parameter in enumerate(parameters):
            parameter.grad = randn(*parameter.shape, seed=10 * step + index)
        if step < steps:
            optimiser.step()
    moved, jacobian = virtual_step(optimiser, "adamw")
    optimiser.step()
    for ahead, parameter in zip(moved, parameters, strict=True):
        assert torch.allclose(ahead, parameter, rtol=1e-12, atol=1e-12)
    assert jacobian == [0.1, 0.02]


def test_a_warm_adamw_s_jacobian_is_autograd_s() -> None:
    parameter = nn.Parameter(randn(6, seed=1))
    optimiser = torch.optim.AdamW([parameter], lr=RATE, weight_decay=0.0)
    for step in range(3):
        parameter.grad = randn(6, seed=20 + step)
        optimiser.step()
    gradient = randn(6, seed=30).requires_grad_()
    state = optimiser.state[parameter]
    mean = (0.9 * state["exp_avg"] + 0.1 * gradient) / (1 - 0.9**4)
    square = (0.999 * state["exp_avg_sq"] + 0.001 * gradient**2) / (1 - 0.999**4)
    moves = RATE * mean / (square.sqrt() + 1e-8)
    (wanted,) = torch.autograd.grad(moves.sum(), gradient)
    parameter.grad = gradient.detach()
    _, (jacobian,) = virtual_step(optimiser, "adamw-exact")
    assert isinstance(jacobian, Tensor)
    assert torch.allclose(jacobian, wanted, rtol=1e-9)


def test_a_loss_that_fails_leaves_the_values_as_they_were() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimiser = torch.optim.AdamW([parameter], lr=0.1)

    def broken(gates: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        hypergradient(torch.ones(2), optimiser, lambda z: (parameter * z.sum()).sum(), broken)
    assert torch.equal(parameter, torch.ones(3))
