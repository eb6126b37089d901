"""Train one client: write the global values in, train, read them out, encode the update.

A plan that searches takes the steps of fedpet/search/on_client.py instead of training.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

import numpy as np
import torch

from fedpet.client.global_values import TierValues
from fedpet.client.model_cache import LoadedPlan
from fedpet.client.own_rows import measure_after, measure_before
from fedpet.codec import encode_with_feedback
from fedpet.codec.torch_rotation import rotate_updates
from fedpet.errors import TrainingError
from fedpet.pet.layers.client_forward import NotStackableError
from fedpet.pet.model import PetModel
from fedpet.protocol.codec_seeds import uplink_rotation_seed, uplink_seeds
from fedpet.protocol.frame import Frame
from fedpet.search import SearchModel, client_config
from fedpet.training.at_once import ClientWork, TrainedClient, train_at_once
from fedpet.training.loop import TrainResult, train_rows, training_passes
from fedpet.utils.seeds import client_id64, derive_seed

__all__ = ["Outcome", "passes_of_all", "train_client", "train_together"]

LOG = logging.getLogger("fedpet")
Outcome = TrainedClient | TrainingError


def train_client(
    loaded: LoadedPlan,
    start: TierValues,
    client: int,
    server_round: int,
    residual: np.ndarray | None = None,
    outcome: Outcome | None = None,
) -> tuple[Frame, np.ndarray | None]:
    """Train a client from the global values.

    Args:
        loaded: The plan in force.
        start: The client's tier, and the global values of it.
        client: Its number.
        server_round: Counted from 1.
        residual: With error feedback what the codec lost of the client's last accepted update,
            float32, (values of the tier,); None is nothing.
        outcome: Of its training, where it was trained with others already.

    Returns:
        The frame with the update, and with error feedback the residual that it leaves.

    Raises:
        TrainingError: The trained values are not finite.
    """
    plan, pet = loaded.plan, loaded.pet
    seed = _seed_of(loaded, client, server_round)
    pet.set_tier(start.tier)
    if isinstance(outcome, TrainingError):
        raise outcome
    measured, trained = measure_before(loaded, start, client, seed), None
    if outcome is None:
        pet.set_delta(torch.from_numpy(start.values), seed=seed)
        result = _train_or_search(loaded, client, server_round, seed)
        outcome = TrainedClient(pet.get_delta().numpy() - start.values, result)
    elif measured is not None:
        trained = start.values + outcome.update
    result, update = outcome.result, outcome.update
    if not np.isfinite(update).all():
        raise TrainingError(
            "the trained values hold NaN or infinity: lower training.learning-rate."
        )
    measured = measure_after(loaded, measured, client, trained, seed)
    coding = loaded.codings[start.tier]
    seeds = uplink_seeds(plan.seed, server_round, client)
    if plan.codec.error_feedback:
        payload, residual = encode_with_feedback(update, residual, coding, **seeds)
    else:
        payload, residual = coding.encode(update, **seeds, rotated=outcome.rotated), None
    frame = Frame(
        plan_digest=loaded.digest,
        server_round=server_round,
        client=client,
        codec=plan.codec.uplink,
        count=pet.num_values,
        num_examples=result.num_examples,
        loss=result.loss,
        train_seconds=result.train_seconds,
        payload=payload,
        metric=measured,
    )
    return frame, residual


@contextmanager
def passes_of_all(loaded: LoadedPlan) -> Iterator[None]:
    """Set the model up once for all clients that are trained one by one within the context."""
    pet, training = loaded.pet, loaded.plan.training
    with ExitStack() as stack:
        one_by_one = len(pet.tiers) == training.clients_at_once == 1
        if isinstance(pet, PetModel) and one_by_one and loaded.trainers is None:
            with suppress(Exception):  # of each client alone: it is refused for it
                stack.enter_context(training_passes(pet.model, loaded.data.train, training))
        yield


def train_together(
    loaded: LoadedPlan, clients: Sequence[tuple[int, TierValues]], server_round: int
) -> dict[int, Outcome]:
    """Train clients side by side, those of a tier at once.

    Args:
        loaded: The plan in force.
        clients: Their numbers, with the tier and the global values of each.
        server_round: Counted from 1.

    Returns:
        By client: its outcome; without those that have to be trained alone.
    """
    plan, pet = loaded.plan, loaded.pet
    outcomes: dict[int, Outcome] = {}
    if isinstance(pet, SearchModel) or loaded.trainers is not None:
        return outcomes
    rule = plan.evaluation
    known = [
        (client, start)
        for client, start in clients
        if len(loaded.rows_of.get(client, ())) and not (rule and rule.is_unseen(client))
    ]
    rotation_seed = uplink_rotation_seed(plan.seed, server_round)

    def rotate(updates: torch.Tensor) -> bool:
        if plan.codec.error_feedback or plan.measures:  # what was lost is added first, or measured
            return False
        return rotate_updates(updates, loaded.codings[tier], rotation_seed)

    for tier, group in itertools.groupby(
        sorted(known, key=lambda one: one[1].tier), key=lambda one: one[1].tier
    ):
        same_tier = list(group)
        if len(same_tier) < 2:
            continue
        pet.set_tier(tier)
        work = [
            ClientWork(loaded.rows_of[client], _seed_of(loaded, client, server_round))
            for client, _ in same_tier
        ]
        try:
            trained = train_at_once(
                pet, same_tier[0][1].values, work, loaded.data.train, plan.task, plan.training,
                factor=plan.rate_factor(server_round), rotate=rotate,
            )  # fmt: skip
        except NotStackableError as error:
            _tell(str(error))
            return outcomes
        except torch.OutOfMemoryError:
            _tell("memory ran out for so many at once: lower training.clients-at-once")
            return outcomes
        except Exception as error:  # each meets its own alone, and touches no other
            LOG.warning("clients are trained one by one", exc_info=error)
            return outcomes
        outcomes |= zip((client for client, _ in same_tier), trained, strict=True)
    return outcomes


@functools.cache
def _tell(reason: str) -> None:
    LOG.warning("clients are trained one by one: %s.", reason)


def _seed_of(loaded: LoadedPlan, client: int, server_round: int) -> int:
    return derive_seed("client", loaded.plan.seed, server_round, client)


def _train_or_search(loaded: LoadedPlan, client: int, server_round: int, seed: int) -> TrainResult:
    plan, pet, data = loaded.plan, loaded.pet, loaded.data
    rows = loaded.rows_of[client]
    if loaded.trainers is not None and isinstance(pet, PetModel):
        [own] = [one for one in data.clients if client_id64(one.id) == client]
        return loaded.trainers.train(own, pet, plan, seed, plan.rate_factor(server_round))
    if isinstance(pet, SearchModel):
        assert plan.search is not None
        config = client_config(plan.search, client)
        return pet.search_rows(
            data.train, rows, plan.task, config, server_round=server_round,
            logit_adjustment=plan.training.logit_adjustment, loss=plan.training.loss,
        )  # fmt: skip
    return train_rows(
        pet.model,
        pet.parameter_groups(),
        data.train,
        rows,
        plan.task,
        plan.training,
        seed=seed,
        factor=plan.rate_factor(server_round),
        after_step=pet.after_step,
        sent=pet.sent_values(),
    )
