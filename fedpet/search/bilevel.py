"""Take bi-level steps: alpha on one half of the rows, the candidates' values on the other.

In:  a model with all candidates on it, two batches, the optimisers' state.
Out: alpha and the candidates' values, one step on.

One step, as in the paper's code (five passes forward and back):

    1. theta' = theta after one virtual step on the theta batch
    2. g = dL(alpha batch; theta') / dalpha,  v = dL(alpha batch; theta') / dtheta'
    3. H = (dL(theta batch; theta + eps d) - dL(theta batch; theta - eps d)) / dalpha / (2 eps)
    4. alpha takes an AdamW step on g - H
    5. theta takes an AdamW step on the theta batch, with new noise and a new zeta

The direction d is the virtual step's Jacobian times v. Which Jacobian is the choice `virtual`:

    adamw        an AdamW step with a copy of the real optimiser's state, and yet the Jacobian of
                 SGD, rate * 1: the paper's. Exact only where AdamW happens to act like SGD.
    adamw-exact  the same step and its own Jacobian. In a cold AdamW, whose first step is
                 rate * sign(gradient), that is nearly 0, and little is left of H.
    sgd          a step of plain SGD, whose Jacobian is rate * 1: exact, up to eps.

The virtual copy holds the trainables, not a second backbone: they are written into the one model
and taken back. The same noise and zeta serve steps 1 to 3, so the gates are one tensor whose
gradient is gathered over three passes and sent to alpha once.

Source: S3PET (Hu et al., NeurIPS 2022, arXiv:2206.07382), after DARTS (Liu et al., ICLR 2019,
arXiv:1806.09055). Ours: rates may differ by group; `sgd`, `adamw-exact` and the first order; for
alpha `SharedScale` and the gradient through zeta; steps before the first of alpha, with gates that
are drawn or all open. A small budget draws nearly all gates close to 0, and AdamW then moves a
candidate in a few of the steps only: open, it has learned something when gates begin to move.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedpet.backbone.device import device_of, to_device
from fedpet.config import SearchConfig
from fedpet.errors import ConfigError, TrainingError
from fedpet.pet.model import PetModel
from fedpet.search.gates import concrete, probabilities, uniform
from fedpet.search.settings import temperature
from fedpet.search.space import Space
from fedpet.tasks import BatchLoss
from fedpet.training.optimizer import make_optimizer, rate_factor
from fedpet.utils.seeds import derive_seed

__all__ = ["BiLevel", "SharedScale", "StepLosses", "hypergradient", "virtual_step"]

RADIUS = 0.01  # of the finite difference: the length of eps * d
_GUARD = 1e-6  # on the norm of d
# A loss under some gates, of the trainables as they now are.
GatedLoss = Callable[[Tensor], Tensor]


class SharedScale(torch.optim.Optimizer):
    """Momentum whose steps keep the ratios of the gradients, outliers cut.

    Gradients are divided by one number for all, the running mean of their median magnitude, and cut
    to three. AdamW, which the paper takes for alpha, divides each by its own: it steps as far for a
    candidate that helps a little in each batch as for one that helps much, so the order among those
    that help is left to noise. And one candidate that a batch hates, in a mean of squares, would
    stop all others.
    """

    def __init__(
        self, params: Sequence[Tensor], lr: float, momentum: float = 0.9, cut: float = 3.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "cut": cut})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step: `lr` for a gradient of the median magnitude."""
        for group in self.param_groups:
            keep, cut = group["momentum"], group["cut"]
            for parameter in group["params"]:
                state, gradient = self.state[parameter], parameter.grad
                if not state:
                    state["step"] = torch.zeros(())
                    state["mean"] = torch.zeros_like(parameter)
                    state["scale"] = torch.zeros((), dtype=parameter.dtype)
                state["step"] += 1
                done = float(state["step"])
                state["scale"] += (gradient.abs().median() - state["scale"]) / done
                if state["scale"] > 0:
                    state["mean"].lerp_((gradient / state["scale"]).clamp(-cut, cut), 1 - keep)
                parameter.sub_(group["lr"] * state["mean"] / (1 - keep**done))


def virtual_step(
    optimiser: torch.optim.Optimizer, rule: str
) -> tuple[list[Tensor], list[Tensor | float]]:
    """Compute one step on the present gradients, and its Jacobian's diagonal.

    Args:
        optimiser: AdamW whose parameters hold their gradients; its state is only read.
        rule: "adamw", "adamw-exact" or "sgd".

    Returns:
        The parameters after the step, as new tensors; and -dtheta'/dgradient, elementwise.
    """
    moved: list[Tensor] = []
    jacobian: list[Tensor | float] = []
    for group in optimiser.param_groups:
        rate = float(group["lr"])
        for parameter in group["params"]:
            theta, gradient = parameter.detach(), parameter.grad
            if rule == "sgd":
                moved.append(theta - rate * gradient)
                jacobian.append(rate)
                continue
            state = optimiser.state.get(parameter, {})
            one, two = group["betas"]
            taken = int(state["step"]) + 1 if state else 1
            mean = (1 - one) * gradient
            square = (1 - two) * gradient.square()
            if state:
                mean += one * state["exp_avg"]
                square += two * state["exp_avg_sq"]
            mean /= 1 - one**taken
            root = (square / (1 - two**taken)).sqrt_()
            below = root + group["eps"]
            moved.append(theta * (1 - rate * group["weight_decay"]) - rate * mean / below)
            if rule == "adamw":
                jacobian.append(rate)
                continue
            # d(mean / below) / dgradient, with root > 0 wherever the gradient is not 0
            slope = (1 - two) / (1 - two**taken) * gradient / root.clamp(min=1e-30)
            change = (1 - one) / (1 - one**taken) / below - mean * slope / below.square()
            jacobian.append(rate * change)
    return moved, jacobian


def hypergradient(
    gates: Tensor,
    optimiser: torch.optim.Optimizer,
    theta_loss: GatedLoss,
    alpha_loss: GatedLoss,
    *,
    rule: str = "adamw",
    written: Callable[[], None] | None = None,
) -> tuple[Tensor, float, float]:
    """Differentiate the alpha loss after one virtual step with respect to the gates.

    Args:
        gates: A leaf of any shape; not changed.
        optimiser: Of the trainables, each of which holds a gradient tensor in place. Trainables
            and state are as before when this returns.
        theta_loss: On the theta batch, under gates.
        alpha_loss: On the alpha batch, under gates.
        rule: The virtual step, see `virtual_step`.
        written: Called after each writing of the trainables.

    Returns:
        The gradient, of the gates' shape; the theta loss; the alpha loss after the virtual step.
    """
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    fixed = gates.detach()
    start = [parameter.detach().clone() for parameter in parameters]

    def write(values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)
        if written is not None:
            written()

    def gate_gradient(loss_of: GatedLoss) -> tuple[Tensor, float]:
        leaf = fixed.clone().requires_grad_()
        loss = loss_of(leaf)
        (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True)
        return (torch.zeros_like(fixed) if gradient is None else gradient), float(loss.detach())

    try:
        zero(parameters)
        loss = theta_loss(fixed)
        loss.backward()
        moved, jacobian = virtual_step(optimiser, rule)
        write(moved)
        del moved

        zero(parameters)
        leaf = fixed.clone().requires_grad_()
        after = alpha_loss(leaf)
        after.backward()
        result = leaf.grad if leaf.grad is not None else torch.zeros_like(fixed)
        # Divided by one rate, so that with a single rate the direction is v itself.
        unit = max(float(group["lr"]) for group in optimiser.param_groups) or 1.0
        direction = [
            parameter.grad * (d / unit) for parameter, d in zip(parameters, jacobian, strict=True)
        ]
        length = math.sqrt(sum(float(d.double().square().sum()) for d in direction))
        if length > 0:
            eps = RADIUS / (length + _GUARD)
            sides = []
            for sign in (1.0, -1.0):
                write([s + sign * eps * d for s, d in zip(start, direction, strict=True)])
                sides.append(gate_gradient(theta_loss)[0])
            result = result - unit * (sides[0] - sides[1]) / (2 * eps)
    finally:
        write(start)
        zero(parameters)
    return result.detach(), float(loss.detach()), float(after.detach())


def zero(parameters: Sequence[Tensor]) -> None:
    """Set gradients to zero in place, and make those that are missing."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        else:
            parameter.grad.zero_()


@dataclass(frozen=True)
class StepLosses:
    """The losses of one step, before its updates."""

    theta: float
    alpha: float  # after the virtual step; at theta itself with the first order


class BiLevel:
    """A model with a whole space on it, and what a search moves.

    Laws: at every step the expected size under the gates is the budget (law 8); a step depends on
    the state, the batches, the seed and the step's number alone, so a search that was saved and
    loaded goes on bit for bit.
    """

    def __init__(
        self,
        pet: PetModel,
        space: Space,
        config: SearchConfig,
        *,
        total_steps: int,
        loss: BatchLoss,
    ) -> None:
        """Start a search, at alpha 0.

        Args:
            pet: Made with `space.structure()`; its values are where the search starts.
            space: The candidates.
            config: Settled: its budget in values, its rates above 0.
            total_steps: At which the rates have fallen to 0.
            loss: Of the model, a batch's inputs and its labels.

        Raises:
            StructureError: The budget does not fit the space.
            ConfigError: The rate of the candidates' values is 0, or no step moves gates.
        """
        lacking = [kind for kind in pet.parameter_groups() if not config.rate_of(kind) > 0]
        if lacking:
            raise ConfigError(
                f"a search's rate must be above 0, got {config.rate_of(lacking[0])!r} for "
                f"{lacking[0]!r}."
            )
        if config.warmup_steps >= max(1, total_steps):
            raise ConfigError(
                f"search.warmup-steps must leave steps in which gates move, got "
                f"{config.warmup_steps} of {total_steps}: lower it, or take more steps."
            )
        self.budget = float(config.budget)
        space.check_budget(self.budget)
        self.pet, self.space, self.config = pet, space, config
        self.steps_done = 0
        self._device = device_of(pet.model)
        self._total = max(1, total_steps)
        self._loss = loss
        self._sizes = torch.tensor(space.sizes, dtype=torch.float64)
        self.alpha = nn.Parameter(torch.zeros(len(space.candidates), dtype=torch.float64))
        self._groups = pet.parameter_groups()
        self._theta = make_optimizer(self._groups, config.rate_of, fused=None)
        self._alpha: torch.optim.Optimizer
        if config.gate_optimizer == "shared":
            self._alpha = SharedScale([self.alpha], lr=config.gate_learning_rate)
        else:
            self._alpha = make_optimizer(
                {"alpha": self.alpha}, lambda _: config.gate_learning_rate, fused=None
            )
        self._rates = [
            (group, float(group["lr"]))
            for optimiser in (self._theta, self._alpha)
            for group in optimiser.param_groups
        ]

    @property
    def beta(self) -> float:
        """Return the temperature at this step."""
        return temperature(self.config, self.steps_done / self._total)

    def probabilities(self) -> Tensor:
        """Return p of every candidate, float64, shape (n,), with a gradient to alpha."""
        by_value = self.config.competition == "values"
        return probabilities(self.alpha, self._sizes, self.budget, self.beta, by_value=by_value)

    def choice(self) -> list[int]:
        """Return the candidates that selection would take now."""
        # alpha's order is p's, and holds where p comes to 0 or 1 within its guards.
        alpha = self.alpha.tolist()
        return self.space.select(alpha, self.budget)

    def open_gates(self) -> None:
        """Set the gates for evaluation: at p, or at the selection with hard gates."""
        with torch.no_grad():
            gates = self.probabilities()
        if self.config.hard:
            chosen = self.choice()
            gates = torch.zeros_like(gates)
            gates[chosen] = 1.0
        self.pet.set_gates(gates.float())

    def step(self, theta_batch: dict[str, Tensor], alpha_batch: dict[str, Tensor]) -> StepLosses:
        """Move alpha, then the candidates' values.

        Args:
            theta_batch: As `Rows.batch` gives it; moves the values.
            alpha_batch: Of other rows; moves alpha.

        Raises:
            TrainingError: A loss is not a number.
        """
        config = self.config
        theta_batch = to_device(theta_batch, self._device)
        alpha_batch = to_device(alpha_batch, self._device)
        factor = rate_factor("linear", self.steps_done / self._total)
        for group, rate in self._rates:
            group["lr"] = rate * factor
        if self.pet.model.training != config.dropout:
            self.pet.model.train(config.dropout)
        self._reseed("step")
        if self.steps_done < config.warmup_steps:
            return self._move_values(theta_batch, opened=config.warmup_gates == "open")

        drawn = self._draw("alpha")
        gates = drawn.detach().float()
        if config.order == "second":
            gradient, theta_loss, alpha_loss = hypergradient(
                gates,
                self._theta,
                lambda z: self._batch_loss(theta_batch, z),
                lambda z: self._batch_loss(alpha_batch, z),
                rule=config.virtual,
                written=self.pet.after_step,
            )
        else:
            leaf = gates.clone().requires_grad_()
            loss = self._batch_loss(alpha_batch, leaf)
            (gradient,) = torch.autograd.grad(loss, leaf)
            theta_loss = alpha_loss = float(loss.detach())
        self.alpha.grad = None
        drawn.backward(gradient.to(drawn))
        assert self.alpha.grad is not None
        if config.competition == "values":  # the surplus of each candidate by its price, a value
            self.alpha.grad *= self._sizes.mean() / self._sizes
        self._update(self._alpha, [self.alpha])
        moved = self._move_values(theta_batch)
        if config.order == "first":
            theta_loss = moved.theta
        self._check(theta_loss, alpha_loss)
        return StepLosses(theta_loss, alpha_loss)

    def _move_values(self, theta_batch: dict[str, Tensor], *, opened: bool = False) -> StepLosses:
        """Take the step of the candidates' values; its loss stands for both."""
        self.pet.zero_grad()
        gates = torch.ones_like(self.alpha) if opened else self._draw("theta")
        loss = self._batch_loss(theta_batch, gates.detach().float())
        loss.backward()
        self._update(self._theta, list(self._groups.values()))
        self.pet.after_step()
        self.steps_done += 1
        here = float(loss.detach())
        self._check(here, here)
        return StepLosses(here, here)

    def _check(self, theta_loss: float, alpha_loss: float) -> None:
        if not math.isfinite(theta_loss + alpha_loss):
            raise TrainingError(
                f"a loss became {theta_loss}, {alpha_loss} at step {self.steps_done} of the "
                "search: lower its rate, or look at the rows."
            )

    @torch.no_grad()
    def continue_from(self, steps_done: int, alpha: Tensor) -> None:
        """Take up a search at a step, with an alpha of others; the model has their values.

        The optimisers begin anew: their moments are of steps that were taken elsewhere.
        """
        self.steps_done = steps_done
        self.alpha.copy_(alpha)

    def state(self) -> dict[str, Any]:
        """Return all that a search needs to continue, as tensors, numbers and names."""
        return {
            "steps_done": self.steps_done,
            "alpha": self.alpha.detach().clone(),
            "values": {kind: group.detach().clone() for kind, group in self._groups.items()},
            "theta_optimiser": self._theta.state_dict(),
            "alpha_optimiser": self._alpha.state_dict(),
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.steps_done = int(state["steps_done"])
        self.alpha.copy_(state["alpha"])
        for kind, group in self._groups.items():
            group.copy_(state["values"][kind])
        self._theta.load_state_dict(state["theta_optimiser"])
        self._alpha.load_state_dict(state["alpha_optimiser"])
        # Loading makes new tables of rates.
        tables = [*self._theta.param_groups, *self._alpha.param_groups]
        self._rates = [(table, rate) for table, (_, rate) in zip(tables, self._rates, strict=True)]
        self.pet.after_step()

    def _batch_loss(self, batch: dict[str, Tensor], gates: Tensor) -> Tensor:
        self.pet.set_gates(gates)
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        return self._loss(self.pet.model, inputs, batch["labels"])

    def _draw(self, what: str) -> Tensor:
        noise = derive_seed("gates", self.config.seed, self.steps_done, what)
        u = uniform(len(self.alpha), noise)
        return concrete(self.probabilities(), u, hard=self.config.hard)

    def _reseed(self, what: str) -> None:
        if self.config.dropout:
            torch.manual_seed(derive_seed("dropout", self.config.seed, self.steps_done, what))

    def _update(self, optimiser: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> None:
        if self.config.clip_norm:
            nn.utils.clip_grad_norm_(parameters, self.config.clip_norm)
        optimiser.step()
