"""Train one client by a `transformers.Trainer`: its loop, on the plan's trainables.

In:  a Trainer, the adapted model at the round's values, and a seed.
Out: the model moved by the Trainer's steps, and how that went.

A round is one call of `trainer.train()`, with the optimiser and the schedule of rates made anew.
The order of the rows and dropout are drawn from the client's seed of the round, so a client that
takes few steps a round sees other rows in the next one, and results depend on nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from fedpet.errors import ConfigError
from fedpet.training.loop import TrainResult, num_examples

if TYPE_CHECKING:
    import torch

    from fedpet.config import TrainingConfig
    from fedpet.data import Rows
    from fedpet.pet.model import PetModel
    from fedpet.protocol.plan import Plan

__all__ = ["RATES", "check_training", "train_by_trainer"]

RATES = ("federation", "trainer")
_SEEDS = 1 << 31  # of numpy's generators, which a Trainer seeds as well


def train_by_trainer(
    trainer: Any,
    pet: PetModel,
    plan: Plan,
    rows: Rows,
    indices: np.ndarray,
    *,
    seed: int,
    factor: float,
    own_rates: bool = False,
) -> TrainResult:
    """Call `trainer.train()` on the adapted model.

    Args:
        trainer: Of transformers; its model is replaced by `pet`.
        pet: At the values to start from.
        plan: Says the learning rates, and what is counted.
        rows: All tokenised rows here, by which the update is weighed.
        indices: The client's among them.
        seed: Of the client's round.
        factor: Of all learning rates, by the run's schedule; the Trainer's own acts within a round.
        own_rates: Take the Trainer's learning rate for all that is trained.

    Raises:
        ConfigError: The plan asks for what a Trainer does not do.
    """
    from transformers import set_seed
    from transformers.trainer_utils import SaveStrategy

    check_training(plan.training)
    started = time.perf_counter()
    pet.to(trainer.args.device)
    for name, value in {"seed": seed % _SEEDS, "data_seed": seed % _SEEDS}.items():
        setattr(trainer.args, name, value)
    trainer.accelerator.dataloader_config.data_seed = seed % _SEEDS
    trainer.args.save_strategy = SaveStrategy.NO
    trainer.args.load_best_model_at_end = trainer.args.push_to_hub = False
    _drop_printers(trainer)
    trainer.model = trainer.model_wrapped = trainer.callback_handler.model = pet
    trainer.model_init = trainer.optimizer = trainer.lr_scheduler = None
    rates = {} if own_rates else _rates(pet, plan, factor)
    make, call = trainer.create_optimizer, pet.forward
    trainer.create_optimizer = _with_rates(make, pet.parameter_groups(), rates)
    set_seed(seed % _SEEDS)
    try:
        loss = float(trainer.train().training_loss)
    finally:
        del trainer.create_optimizer  # the instance's; the class has its own
        pet.forward = call  # type: ignore[method-assign]  # which accelerate wraps for autocast
        trainer.accelerator.free_memory()
        trainer.optimizer = trainer.lr_scheduler = None
    pet.after_step()
    counted = num_examples(plan.task, rows, indices)
    return TrainResult(counted, loss, time.perf_counter() - started)


def check_training(training: TrainingConfig) -> None:
    """Refuse settings that ask for what a Trainer's own loop does not do.

    Raises:
        ConfigError: It names the key.
    """
    asked = {
        "training.proximal-mu": training.proximal_mu,
        "training.loss": training.loss,
        "training.logit-adjustment": training.logit_adjustment,
    }
    for key, value in asked.items():
        if value:
            raise ConfigError(
                f"{key} is {value!r}, and clients are trained by a script's Trainer, whose loss is "
                "its own: leave the key out."
            )


def _rates(pet: PetModel, plan: Plan, factor: float) -> dict[str, float]:
    return {kind: plan.training.rate_of(kind) * factor for kind in pet.parameter_groups()}


def _with_rates(
    make: Callable[..., torch.optim.Optimizer],
    groups: Mapping[str, nn.Parameter],
    rates: Mapping[str, float],
) -> Callable[..., torch.optim.Optimizer]:
    """Return `create_optimizer` with a group of its own for each kind that has a rate."""
    kinds = {id(parameter): kind for kind, parameter in groups.items()}

    def create_optimizer(*args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = make(*args, **kwargs)
        if rates:
            optimizer.param_groups = [
                {**group, "params": [parameter], "lr": rates[kinds[id(parameter)]]}
                for group in optimizer.param_groups
                for parameter in group["params"]
            ]
        return optimizer

    return create_optimizer


def _drop_printers(trainer: Any) -> None:
    """Take off what writes to the terminal, which shows the run's own progress."""
    from transformers import PrinterCallback, ProgressCallback

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
