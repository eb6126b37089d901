"""Take a client's part of a federated search: a few bi-level steps on its own rows.

In:  the average so far, of alpha and of the candidates' values; a client's rows; the round.
Out: the client's own, some steps on. What is sent is the difference, as in training.

A client's steps are those that a central search on its rows alone would take at this point of the
search: the same gates, batches, rates and temperature, by the number of the step. Only alpha and
the values come from the average, and the moments of both AdamWs begin anew each round, since a
client comes by seldom and keeps nothing. So AdamW's first steps of a round are about its rate in
size, whatever the gradient. A mask and the head are trained beside the candidates, ungated.

With `search.sends = "gates"` the candidates' values are neither sent nor averaged: they are zero at
the start of each client's work, and alpha and the head alone travel, some hundreds of numbers. The
unrolled step then says which candidate would help the other half of the rows, were it to move.

The rows are split once, by the seed and the client, into two halves: one moves the values, the
other alpha, and neither ever does the other's part. Of an odd number one row is left out. With a
single row there are not two levels, and the client is refused.

Both halves have as many rows of each class, to one. Of few rows a random half that has more of a
class leaves fewer to the other, so that, measured from the client's own shares, the gradients of
the two point in opposite directions: whatever would help most looks most harmful.

Source: ours; the steps are S3PET's (Hu et al., NeurIPS 2022, arXiv:2206.07382). What is averaged is
alpha, not the probabilities: a shift of alpha changes no probability, so clients need not agree on
one. Deviations: the moments; alpha travels as float32; the average of values under gates is not the
average of models; HiWi on a bias that BitFit has too goes on as BitFit's (one vector is sent).
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedpet.backbone.device import device_of
from fedpet.config import SearchConfig
from fedpet.errors import TrainingError
from fedpet.pet.layout import Segment
from fedpet.pet.model import PetModel
from fedpet.search.bilevel import BiLevel
from fedpet.search.search_rows import Split, step_batches
from fedpet.search.space import Space, model_of_space
from fedpet.training.loop import TrainResult, num_examples
from fedpet.training.loss import client_loss
from fedpet.utils.seeds import derive_seed

if TYPE_CHECKING:
    from fedpet.backbone.pretrained import Backbone
    from fedpet.data import Task
    from fedpet.data.rows import Rows
    from fedpet.pet.mask import Mask

__all__ = ["ALPHA", "SearchModel", "client_config", "split_in_two"]

ALPHA = "alpha"  # the kind of segment that it is


class SearchModel:
    """A model with a whole space on it, and alpha: the face of a `PetModel`, for a search.

    What is communicated is the model's values and then alpha, one number a candidate. Zeros are the
    checkpoint, and gates that are all alike.

    Law: `search_rows` depends on what was loaded, on the rows, the round and the seed alone.

    Args:
        pet: With all candidates of the space on it, each with a gate, see `model_of_space`.
        space: The candidates.
        gates_alone: Send alpha and the head; the candidates' values stay here, and are zero at
            every start of a client's work.
    """

    def __init__(self, pet: PetModel, space: Space, *, gates_alone: bool = False) -> None:
        self.pet, self.space = pet, space
        self.model = pet.model
        self._gates_alone = gates_alone
        self.alpha = torch.zeros(len(space.candidates), dtype=torch.float64)
        self.tiers = tuple(self._layout(segments) for segments in pet.tiers)
        self.segments = self.tiers[-1]

    @classmethod
    def of(
        cls,
        backbone: Backbone,
        mask: Mask | None,
        space: Space,
        config: SearchConfig,
        *,
        seed: int,
        products: str = "torch",
    ) -> SearchModel:
        """Put the whole space of a search on a backbone, in place.

        Raises:
            InputError: The budget does not fit the space.
        """
        space.check_budget(float(config.budget))
        pet = model_of_space(backbone, space, mask, seed=seed, products=products)
        return cls(pet, space, gates_alone=config.sends == "gates")

    @property
    def num_values(self) -> int:
        """Count the values of the layout in use, alpha included."""
        return sum(segment.size for segment in self.segments)

    @property
    def inexact_kinds(self) -> tuple[str, ...]:
        """See `PetModel`; beside these, nothing is exact under gates."""
        return self.pet.inexact_kinds

    def set_tier(self, tier: int) -> None:
        """See `PetModel.set_tier`."""
        self.pet.set_tier(tier)
        self.segments = self.tiers[tier]

    def get_delta(self) -> Tensor:
        """Return the communicated values and alpha: float32, (num_values,), on the CPU, a copy."""
        of_model = self.num_values - len(self.alpha)
        kept = self.pet.get_delta()[self.pet.num_values - of_model :]
        return torch.cat([kept, self.alpha.float()])

    def set_delta(self, values: Tensor, *, seed: int) -> None:
        """Set model and alpha to the point `values`, see `PetModel.set_delta`."""
        of_model = len(values) - len(self.alpha)
        here = torch.zeros(self.pet.num_values)
        here[len(here) - of_model :] = values[:of_model]  # all, or the head's, which come last
        self.pet.set_delta(here, seed=seed)
        self.alpha = values[of_model:].double()

    def search_rows(
        self,
        rows: Rows,
        indices: np.ndarray,
        task: Task,
        config: SearchConfig,
        *,
        server_round: int,
        logit_adjustment: float = 0.0,
        loss: str = "",
    ) -> TrainResult:
        """Take the bi-level steps of one round.

        Args:
            rows: All tokenised rows here.
            indices: The client's among them, (n,).
            task: Says which loss.
            config: Settled, with the client's own seed: see `client_config`.
            server_round: Of the search, from 1: which of its steps these are.
            logit_adjustment: Of both losses, for the client's labels, as in training.
            loss: Of both levels, as `training.loss`: "" is the task's own.

        Returns:
            The weight in the average; the mean theta loss before each step.

        Raises:
            TrainingError: There are too few rows, or a loss is not a number.
        """
        started = time.perf_counter()
        has_classes = task.label_names and rows.labels.ndim == 1
        labels = rows.labels[indices] if has_classes else None
        split = split_in_two(indices, config.seed, labels)
        first = (server_round - 1) * config.local_steps
        total = config.rounds * config.local_steps
        loss_of = client_loss(
            rows.labels[indices], task, logit_adjustment, device_of(self.model), loss
        )
        search = BiLevel(self.pet, self.space, config, total_steps=total, loss=loss_of)
        search.continue_from(first, self.alpha)
        losses = [
            search.step(theta_batch, alpha_batch).theta
            for theta_batch, alpha_batch in step_batches(
                rows, split, config, first, first + config.local_steps
            )
        ]
        self.alpha = search.alpha.detach().clone()
        mean = sum(losses) / len(losses)
        return TrainResult(num_examples(task, rows, indices), mean, time.perf_counter() - started)

    def _layout(self, segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
        if self._gates_alone:
            segments = tuple(segment for segment in segments if segment.kind == "head")
        first = segments[0].start if segments else 0
        sent = [replace(segment, start=segment.start - first) for segment in segments]
        start = sum(segment.size for segment in sent)
        return (*sent, Segment(ALPHA, self.space.name, start, len(self.alpha)))


def client_config(config: SearchConfig, client: int) -> SearchConfig:
    """Return the search's settings with a client's own seed: the same in every round.

    Args:
        config: The plan's.
        client: Its number, see `fedpet.utils.seeds.client_id64`.
    """
    return replace(config, seed=derive_seed("federated search", config.seed, client))


def split_in_two(indices: np.ndarray, seed: int, labels: np.ndarray | None = None) -> Split:
    """Split a client's rows at random, by the seed, into two halves of equal size.

    Args:
        indices: Its rows, (n,).
        seed: Of the client.
        labels: Their classes, (n,): both halves then hold as many of each class, to one. None
            where rows have none.

    Raises:
        TrainingError: There are fewer than two rows.
    """
    if len(indices) < 2:
        raise TrainingError(
            f"a search needs two rows of a client at least, one a level, and this one has "
            f"{len(indices)}. Raise clients.min-rows."
        )
    half = len(indices) // 2
    order = np.random.default_rng(derive_seed("split", seed)).permutation(len(indices))[: 2 * half]
    if labels is None:
        parts = order[:half], order[half:]
    else:
        order = order[np.argsort(labels[order], kind="stable")]
        parts = order[::2], order[1::2]
    return Split(theta=indices[parts[0]], alpha=indices[parts[1]], validation=indices[:0])
